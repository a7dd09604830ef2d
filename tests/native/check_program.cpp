// Drives programs through the C ABI, to be built with a sanitizer: whole steps of prompts and single tokens on one thread
// and on four, over every kind of pool. Prints what went wrong and exits with 1.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "hanlin_cpu.h"

namespace {

void must(int32_t status, const char* what) {
  if (status == HL_OK) return;
  std::printf("%s: %s\n", what, hl_last_error());
  std::exit(1);
}

constexpr int32_t layers = 2, heads = 6, kv_heads = 2, size = 32, width = 64, inner = 96, vocabulary = 77;
constexpr int32_t blocks = 64, block_size = 16, longest = 600, most_tokens = 256;
constexpr int64_t q_width = heads * size, qkv_width = (heads + 2 * kv_heads) * size;

class Memory {
 public:
  explicit Memory(int64_t bytes) : bytes_(bytes) { must(hl_alloc(bytes, &data), "alloc"); }
  ~Memory() { hl_free(data, bytes_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  void* data = nullptr;

 private:
  int64_t bytes_;
};

struct Model {
  Model(int32_t threads, int32_t kv_kind, int32_t weight_kind, int32_t group) {
    must(hl_open(threads, nullptr, &ctx), "open");
    for (int32_t l = 0; l < layers; l++) {
      memory.push_back(new Memory(hl_kv_bytes(kv_kind, blocks, block_size, kv_heads, size)));
      pools.push_back({kv_kind, blocks, block_size, kv_heads, size, memory.back()->data});
    }
    const int64_t widths[] = {width, width, qkv_width, q_width, inner, width, q_width, width, inner};
    enum { x, normal, qkv, seen, unused, rows, seen_rows, normal_rows, inner_rows };
    std::vector<hl_op> ops;
    const auto add = [&](int32_t code, int32_t in, int32_t out) -> hl_op& {
      hl_op op = {};
      op.code = code;
      op.in = in;
      op.in2 = -1;
      op.out = out;
      op.weight = -1;
      op.eps = 1e-5f;
      ops.push_back(op);
      return ops.back();
    };
    const auto linear = [&](int32_t in, int32_t out, int64_t outs, int64_t ins, int32_t flags) {
      hl_op& op = add(HL_OP_LINEAR, in, out);
      op.flags = flags;
      op.weight = pack(weight_kind, group, outs, ins);
    };
    const int32_t head = pack(HL_INT8, 32, vocabulary, width);
    add(HL_OP_EMBED, -1, x).weight = head;
    for (int32_t l = 0; l < layers; l++) {
      const bool last = l == layers - 1;
      add(HL_OP_NORM, x, normal);
      linear(normal, qkv, qkv_width, width, 0);
      for (const int32_t code : {HL_OP_ROPE, HL_OP_ATTEND}) {
        hl_op& op = add(code, qkv, code == HL_OP_ATTEND ? int32_t{seen} : -1);
        op.layer = l;
        op.heads = heads;
        op.kv_heads = kv_heads;
        op.head_size = op.rotary = size;
        op.scale = 0.2f;
      }
      if (last) {
        add(HL_OP_GATHER, x, rows);
        add(HL_OP_GATHER, seen, seen_rows);
      }
      linear(last ? seen_rows : seen, last ? rows : x, width, q_width, HL_ADD);
      add(HL_OP_NORM, last ? rows : x, last ? normal_rows : normal);
      linear(last ? normal_rows : normal, last ? inner_rows : unused, 2 * inner, width, HL_SILU_MUL);
      linear(last ? inner_rows : unused, last ? rows : x, width, inner, HL_ADD);
    }
    add(HL_OP_NORM, rows, normal_rows);
    add(HL_OP_HEAD, normal_rows, -1).weight = head;
    must(hl_program_create(ctx, ops.data(), static_cast<int32_t>(ops.size()), weights.data(),
                           static_cast<int32_t>(weights.size()), widths, 9, pools.data(), layers, most_tokens,
                           &program),
         "program");
    adapt(ops);
  }
  ~Model() {
    hl_program_free(program);
    hl_close(ctx);
    for (Memory* m : memory) delete m;
  }
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;

  int32_t pack(int32_t kind, int32_t group, int64_t out, int64_t in) {
    memory.push_back(new Memory(hl_packed_bytes(kind, out, in, group)));
    hl_weight w = {kind, group, out, in, memory.back()->data};
    std::vector<float> matrix(static_cast<size_t>(out * in));
    for (auto& value : matrix) {
      seed = seed * 1664525u + 1013904223u;
      value = 0.3f * static_cast<float>(static_cast<int32_t>(seed >> 8) - (1 << 23)) / (1 << 23);
    }
    must(hl_pack(ctx, &w, HL_SRC_F32, matrix.data(), out, 0, nullptr, nullptr), "pack");
    weights.push_back(w);
    return static_cast<int32_t>(weights.size()) - 1;
  }

  // Rank 5 on every product, of which every 16 outputs take three dimensions or none.
  void adapt(const std::vector<hl_op>& ops) {
    constexpr int32_t rank = 5, taken = 3;
    low.resize(ops.size());
    for (size_t i = 0; i < ops.size(); i++) {
      if (ops[i].code != HL_OP_LINEAR && ops[i].code != HL_OP_HEAD) continue;
      const hl_weight& w = weights[static_cast<size_t>(ops[i].weight)];
      const int64_t groups = (w.out + HL_TILE - 1) / HL_TILE * 2;
      halves.emplace_back(static_cast<size_t>(rank * w.in), 0.01f);
      const void* down = halves.back().data();
      halves.emplace_back(static_cast<size_t>(groups * taken * 16), 0.02f);
      firsts.emplace_back();
      for (int64_t g = 0; g < groups; g++) firsts.back().push_back(static_cast<int32_t>(g % 4) - 1);
      low[i] = {rank, taken, down, halves.back().data(), firsts.back().data()};
    }
    adapter = {static_cast<int32_t>(ops.size()), rank, 0, low.data()};
    must(hl_adapter_check(program, &adapter), "adapter");
  }

  // Tokens [begin, end) of a text of 600 in one step, beside one token of another sequence; the logits of the last.
  std::vector<float> step(int32_t begin, int32_t end) {
    const int32_t n = end - begin + 1, start[] = {0, 1, n}, context[] = {1, end}, last = n - 1;
    std::vector<int32_t> ids, table(2 * (longest / block_size + 1));
    std::vector<int64_t> slots;
    std::vector<float> cos, sin, logits(vocabulary), values(3), sums(1);
    std::vector<int32_t> top(3);
    const auto token = [&](int32_t sequence, int32_t place) {
      ids.push_back((place * 31 + sequence) % vocabulary);
      slots.push_back(sequence == 0 ? 0 : block_size + place);
      for (int32_t i = 0; i < size / 2; i++) {
        cos.push_back(std::cos(static_cast<float>(place) / static_cast<float>(i + 1)));
        sin.push_back(std::sin(static_cast<float>(place) / static_cast<float>(i + 1)));
      }
    };
    token(0, 0);
    for (int32_t p = begin; p < end; p++) token(1, p);
    const int32_t columns = static_cast<int32_t>(table.size() / 2);
    for (int32_t b = 0; b < columns; b++) table[static_cast<size_t>(columns + b)] = b + 1;
    hl_step s = {};
    s.tokens = n;
    s.sequences = 2;
    s.max_blocks = columns;
    s.rows = 1;
    s.top = 3;
    s.ids = ids.data();
    s.cos = cos.data();
    s.sin = sin.data();
    s.slots = slots.data();
    s.query_start = start;
    s.context = context;
    s.block_table = table.data();
    s.row_index = &last;
    s.logits = logits.data();
    s.top_values = values.data();
    s.top_ids = top.data();
    s.log_sum_exp = sums.data();
    const hl_adapter* const adapters[] = {nullptr, &adapter};
    s.adapters = adapters;
    must(hl_program_run(program, &s), "run");
    return logits;
  }

  hl_ctx* ctx = nullptr;
  hl_program* program = nullptr;
  std::vector<Memory*> memory;
  std::vector<hl_kv> pools;
  std::vector<hl_weight> weights;
  std::vector<std::vector<float>> halves;
  std::vector<std::vector<int32_t>> firsts;
  std::vector<hl_low_rank> low;
  hl_adapter adapter = {};
  uint32_t seed = 1;
};

bool check(int32_t kv_kind, int32_t weight_kind, int32_t group) {
  Model one(1, kv_kind, weight_kind, group), four(4, kv_kind, weight_kind, group);
  for (int32_t begin = 0; begin < 500; begin += 250) one.step(begin, begin + 250);
  for (int32_t begin = 0; begin < 500; begin += 100) four.step(begin, begin + 100);
  for (int32_t begin = 500; begin < 520; begin++) {
    const auto a = one.step(begin, begin + 1), b = four.step(begin, begin + 1);
    if (std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0) continue;
    std::printf("pool %d, weights %d: token %d differs\n", kv_kind, weight_kind, begin);
    return false;
  }
  return true;
}

}  // namespace

int main() {
  bool good = true;
  for (const int32_t kv : {HL_KV_F32, HL_KV_BF16, HL_KV_INT8, HL_KV_INT4}) {
    good &= check(kv, HL_F32, 0);
    good &= check(kv, HL_INT4_MIN, 32);
  }
  return good ? 0 : 1;
}
