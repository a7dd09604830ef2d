// Making programs: all checks, buffers, who prepares what for whom, where barriers stand. program_run.cpp runs them.
#include "program.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>

namespace hl {
namespace {

const char* const names[] = {"EMBED", "NORM", "LINEAR", "ROPE", "ATTEND", "GATE", "ADD", "GATHER", "HEAD"};

enum class Rows : uint8_t { unwritten, tokens, wanted };

struct Sources {
  const hl_op* ops;
  int32_t n_ops;
  const int64_t* widths;
  int32_t n_buffers;
};

class Maker {
 public:
  Maker(hl_program* program, const Sources& sources)
      : program_(*program), from_(sources), rows_(static_cast<size_t>(sources.n_buffers), Rows::unwritten) {}

  int32_t make() {
    if (const int32_t status = check_tables()) return status;
    for (int32_t i = 0; i < from_.n_ops; i++)
      if (const int32_t status = check(i)) return status;
    if (from_.ops[from_.n_ops - 1].code != HL_OP_HEAD)
      return fail(HL_ERR_ARGUMENT, "program: the last operation must be HEAD");
    build();
    return reserve();
  }

 private:
  int64_t width(int32_t buffer) const { return from_.widths[buffer]; }
  Rows& rows(int32_t buffer) { return rows_[static_cast<size_t>(buffer)]; }

  int32_t check_tables() {
    for (int32_t b = 0; b < from_.n_buffers; b++)
      if (width(b) < 1 || width(b) > INT32_MAX)
        return fail(HL_ERR_ARGUMENT, "program: buffer %d has a width of %lld", b, static_cast<long long>(width(b)));
    for (size_t w = 0; w < program_.weights.size(); w++) {
      const char* problem = weight_problem(program_.weights[w]);
      if (problem == nullptr && program_.weights[w].data == nullptr) problem = "no data";
      if (problem != nullptr) return fail(HL_ERR_ARGUMENT, "program: weight %d: %s", static_cast<int>(w), problem);
    }
    for (size_t l = 0; l < program_.pools.size(); l++) {
      const hl_kv &kv = program_.pools[l], &first = program_.pools[0];
      const char* problem = kv_problem(kv);
      if (problem == nullptr && kv.data == nullptr) problem = "no data";
      if (problem == nullptr && (kv.blocks != first.blocks || kv.block_size != first.block_size ||
                                 kv.heads != first.heads || kv.head_size != first.head_size))
        problem = "all pools must have the same shape";
      if (problem != nullptr) return fail(HL_ERR_ARGUMENT, "program: pool %d: %s", static_cast<int>(l), problem);
    }
    return HL_OK;
  }

#if defined(__GNUC__)
  __attribute__((format(printf, 3, 4)))
#endif
  static int32_t wrong(int32_t i, const hl_op& op, const char* format, ...) {
    char text[200];
    va_list values;
    va_start(values, format);
    std::vsnprintf(text, sizeof text, format, values);
    va_end(values);
    return fail(HL_ERR_ARGUMENT, "operation %d (%s): %s", i, names[op.code], text);
  }

  // That an operation makes sense, after those before it.
  int32_t check(int32_t i) {
    const hl_op& op = from_.ops[i];
    if (op.code < HL_OP_EMBED || op.code > HL_OP_HEAD)
      return fail(HL_ERR_ARGUMENT, "operation %d: unknown code %d", i, op.code);
    const bool has_in = op.code != HL_OP_EMBED, has_out = op.code != HL_OP_ROPE && op.code != HL_OP_HEAD;
    const bool has_in2 = op.code == HL_OP_ADD && op.in2 >= 0;
    const bool adds = op.code == HL_OP_LINEAR && op.flags & HL_ADD;
    for (const auto& [buffer, used, read] :
         {Use{op.in, has_in, true}, Use{op.in2, has_in2, true}, Use{op.out, has_out, adds}}) {
      if (!used) continue;
      if (buffer < 0 || buffer >= from_.n_buffers) return wrong(i, op, "buffer %d of %d", buffer, from_.n_buffers);
      if (read && rows(buffer) == Rows::unwritten)
        return wrong(i, op, "buffer %d is read before it is written", buffer);
    }
    const Rows in_rows = has_in ? rows(op.in) : Rows::tokens;
    if (op.code == HL_OP_HEAD
            ? in_rows != Rows::wanted
            : (op.code == HL_OP_ROPE || op.code == HL_OP_ATTEND || op.code == HL_OP_GATHER) && in_rows != Rows::tokens)
      return wrong(i, op, op.code == HL_OP_HEAD ? "needs the rows of a GATHER" : "cannot read the rows of a GATHER");
    if (has_in2 && rows(op.in2) != in_rows) return wrong(i, op, "its inputs hold different rows");
    const Rows out_rows = op.code == HL_OP_GATHER ? Rows::wanted : in_rows;
    if (has_out && rows(op.out) != Rows::unwritten && rows(op.out) != out_rows)
      return wrong(i, op, "buffer %d held rows of another kind before", op.out);
    if (const int32_t status = check_kind(i, op)) return status;
    if (has_out) rows(op.out) = out_rows;
    return HL_OK;
  }
  struct Use {
    int32_t buffer;
    bool used, read;
  };

  int32_t check_kind(int32_t i, const hl_op& op) {
    const hl_weight* weight = nullptr;
    if (op.code == HL_OP_LINEAR || op.code == HL_OP_HEAD || (op.code == HL_OP_EMBED && op.weight != -1)) {
      if (op.weight < 0 || op.weight >= static_cast<int32_t>(program_.weights.size()))
        return wrong(i, op, "weight %d of %d", op.weight, static_cast<int>(program_.weights.size()));
      weight = &program_.weights[static_cast<size_t>(op.weight)];
    }
    switch (op.code) {
      case HL_OP_EMBED:
        return check_embed(i, op, weight);
      case HL_OP_NORM:
        if (op.style < HL_NORM_RMS || op.style > HL_NORM_LAYER || !(op.eps >= 0))
          return wrong(i, op, "kind %d, eps %g", op.style, static_cast<double>(op.eps));
        return same_width(i, op);
      case HL_OP_ADD:
        return op.in2 >= 0 && width(op.in2) != width(op.in) ? wrong(i, op, "its inputs differ in width")
                                                            : same_width(i, op);
      case HL_OP_GATHER:
        return op.in == op.out ? wrong(i, op, "needs a buffer of its own") : same_width(i, op);
      case HL_OP_LINEAR:
      case HL_OP_HEAD:
        return check_linear(i, op, *weight);
      case HL_OP_GATE:
        if (op.style < HL_FN_SILU || op.style > HL_FN_GELU) return wrong(i, op, "unknown function %d", op.style);
        if (op.in == op.out || width(op.in) != 2 * width(op.out))
          return wrong(i, op, "in must be twice as wide as out");
        return HL_OK;
      default:
        return check_attention(i, op);
    }
  }

  int32_t same_width(int32_t i, const hl_op& op) {
    if (width(op.in) == width(op.out)) return HL_OK;
    return wrong(i, op, "in has %lld columns, out %lld", static_cast<long long>(width(op.in)),
                 static_cast<long long>(width(op.out)));
  }

  int32_t check_embed(int32_t i, const hl_op& op, const hl_weight* weight) {
    if (weight == nullptr &&
        (op.table == nullptr || op.table_rows < 1 || op.table_kind < HL_SRC_F32 || op.table_kind > HL_SRC_BF16))
      return wrong(i, op, "needs a weight, or a table of floats");
    if (weight != nullptr && weight->in != width(op.out))
      return wrong(i, op, "the weight has %lld columns, out %lld", static_cast<long long>(weight->in),
                   static_cast<long long>(width(op.out)));
    const int32_t rows = weight != nullptr ? static_cast<int32_t>(weight->out) : op.table_rows;
    program_.vocabulary = program_.vocabulary == 0 ? rows : std::min(program_.vocabulary, rows);
    return HL_OK;
  }

  int32_t check_linear(int32_t i, const hl_op& op, const hl_weight& weight) {
    const bool silu = op.flags & HL_SILU_MUL;
    const int32_t known = op.code == HL_OP_HEAD ? 0 : HL_ADD | HL_SILU_MUL | HL_GELU;
    if (op.flags & ~known || (silu && op.flags & HL_GELU)) return wrong(i, op, "flags %d make no sense", op.flags);
    if (silu && weight.out % HL_TILE != 0) return wrong(i, op, "SILU_MUL needs a multiple of %d outputs", HL_TILE);
    if (weight.in != width(op.in))
      return wrong(i, op, "the weight has %lld inputs, buffer %d %lld", static_cast<long long>(weight.in), op.in,
                   static_cast<long long>(width(op.in)));
    if (op.code == HL_OP_HEAD) {
      if (i != from_.n_ops - 1) return wrong(i, op, "must be the last operation");
      program_.head_in = weight.in;
      program_.head_out = weight.out;
      return HL_OK;
    }
    if (op.in == op.out) return wrong(i, op, "cannot write over its input");
    const int64_t columns = silu ? weight.out / 2 : weight.out;
    if (columns != width(op.out))
      return wrong(i, op, "it makes %lld columns, buffer %d has %lld", static_cast<long long>(columns), op.out,
                   static_cast<long long>(width(op.out)));
    return HL_OK;
  }

  int32_t check_attention(int32_t i, const hl_op& op) {
    if (op.layer < 0 || op.layer >= static_cast<int32_t>(program_.pools.size()))
      return wrong(i, op, "layer %d of %d", op.layer, static_cast<int>(program_.pools.size()));
    const hl_kv& kv = program_.pools[static_cast<size_t>(op.layer)];
    if (op.kv_heads != kv.heads || op.head_size != kv.head_size)
      return wrong(i, op, "%d kv heads of %d, the pool has %d of %d", op.kv_heads, op.head_size, kv.heads,
                   kv.head_size);
    if (op.heads < op.kv_heads || op.heads % op.kv_heads != 0)
      return wrong(i, op, "%d heads are no multiple of %d kv heads", op.heads, op.kv_heads);
    if (program_.heads != 0 && program_.heads != op.heads)
      return wrong(i, op, "all layers must have the same number of heads");
    program_.heads = op.heads;
    const int64_t q = int64_t{op.heads} * op.head_size, all = q + int64_t{2} * op.kv_heads * op.head_size;
    if (op.code == HL_OP_ATTEND) {
      if (op.in == op.out || width(op.in) < q || width(op.out) != q)
        return wrong(i, op, "needs %lld columns of q, and as many of out in another buffer", static_cast<long long>(q));
      return HL_OK;
    }
    if (width(op.in) != all)
      return wrong(i, op, "q, k and v have %lld columns, buffer %d %lld", static_cast<long long>(all), op.in,
                   static_cast<long long>(width(op.in)));
    if (const char* problem = rope_problem(op.style, op.head_size, op.rotary)) return wrong(i, op, "%s", problem);
    if (op.rotary > 0 && program_.rotary > 0 && program_.rotary != op.rotary)
      return wrong(i, op, "all layers must rotate the same dimensions");
    program_.rotary = std::max(program_.rotary, op.rotary);
    return HL_OK;
  }

  // ---- from operations to stages -----------------------------------------------------------------------------------

  static bool multiplies(const hl_op& op) { return op.code == HL_OP_LINEAR || op.code == HL_OP_HEAD; }

  // The forms in which products read what operation i writes, before another one writes it anew.
  std::vector<Prepared> wanted_forms(int32_t i) const {
    std::vector<Prepared> forms;
    for (int32_t j = i + 1; j < from_.n_ops; j++) {
      const hl_op& reader = from_.ops[j];
      if (multiplies(reader) && reader.in == from_.ops[i].out) {
        Prepared form;
        form.act = act_of(program_.weights[static_cast<size_t>(reader.weight)]);
        form.stride = act_stride(form.act, width(reader.in));
        if (std::none_of(forms.begin(), forms.end(), [&](const Prepared& f) { return f.act == form.act; }))
          forms.push_back(form);
      }
      if (reader.code != HL_OP_HEAD && reader.code != HL_OP_ROPE && reader.out == from_.ops[i].out) break;
    }
    return forms;
  }

  void build() {
    for (int32_t i = 0; i < from_.n_ops; i++) {
      Stage stage = {};
      stage.op = from_.ops[i];
      stage.number = i;
      const hl_op& op = stage.op;
      const bool has_out = op.code != HL_OP_ROPE && op.code != HL_OP_HEAD;
      stage.wanted = rows(has_out ? op.out : op.in) == Rows::wanted;
      if (op.code != HL_OP_EMBED) stage.in_width = width(op.in);
      if (has_out) stage.out_width = width(op.out);
      stage.in_stride = row_stride(stage.in_width);
      stage.out_stride = row_stride(stage.out_width);
      if (multiplies(op) || (op.code == HL_OP_EMBED && op.weight >= 0))
        stage.weight = &program_.weights[static_cast<size_t>(op.weight)];
      if (has_out) stage.ready = wanted_forms(i);
      // What makes a row in parts cannot prepare forms that need the whole row: that is a stage of its own.
      Stage extra = stage;
      if (op.code == HL_OP_LINEAR || op.code == HL_OP_ATTEND) {
        const auto whole = [&](const Prepared& f) {
          return f.act == Act::int16 || (op.code == HL_OP_ATTEND && op.head_size % 32 != 0);
        };
        const auto border = std::stable_partition(stage.ready.begin(), stage.ready.end(), [&](const Prepared& f) { return !whole(f); });
        extra.ready.assign(border, stage.ready.end());
        stage.ready.erase(border, stage.ready.end());
      } else {
        extra.ready.clear();
      }
      program_.stages.push_back(std::move(stage));
      if (extra.ready.empty()) continue;
      extra.op.code = op_prepare;
      program_.stages.push_back(std::move(extra));
    }
    for (size_t i = 0; i + 1 < program_.stages.size(); i++) {
      Stage &stage = program_.stages[i], &next = program_.stages[i + 1];
      stage.barrier = !(writes_own_rows(stage.op.code) && reads_own_rows(next.op.code) && stage.wanted == next.wanted);
    }
  }

  // Finds room for buffers, prepared rows and the threads' scratch in one piece of memory.
  int32_t reserve() {
    constexpr int64_t line = 64;
    int64_t used = 0;
    const auto take = [&](int64_t bytes_a_row, int64_t n) {
      const int64_t at = used;
      used += (bytes_a_row * n + line - 1) / line * line;
      return at;
    };
    std::vector<int64_t> floats(static_cast<size_t>(from_.n_buffers));
    for (int32_t b = 0; b < from_.n_buffers; b++)
      floats[static_cast<size_t>(b)] = take(row_stride(width(b)) * 4, program_.max_tokens);
    std::vector<int64_t> prepared(static_cast<size_t>(from_.n_buffers) * acts, -1);
    const auto place = [&](int32_t buffer, const Prepared& form) -> int64_t& {
      return prepared[static_cast<size_t>(buffer) * acts + static_cast<size_t>(form.act)];
    };
    for (const Stage& stage : program_.stages)
      for (const Prepared& form : stage.ready)
        if (place(stage.op.out, form) < 0) place(stage.op.out, form) = take(form.stride, whole_rows(program_.max_tokens));
    if (!program_.pools.empty())
      for (const hl_kv& kv : program_.pools)
        program_.attend_bytes = std::max(program_.attend_bytes, program_.ctx->isa->ops->attend_scratch(kv));
    const int64_t scratch = take(program_.attend_bytes, program_.ctx->pool.size());

    if (const int32_t status = hl_alloc(used, &program_.memory)) return status;
    program_.bytes = used;
    char* base = static_cast<char*>(program_.memory);
    program_.attend_scratch = base + scratch;
    const auto buffer_at = [&](int32_t b) {
      return b < 0 ? nullptr : reinterpret_cast<float*>(base + floats[static_cast<size_t>(b)]);
    };
    for (Stage& stage : program_.stages) {
      const hl_op& op = stage.op;
      if (op.code != HL_OP_EMBED) stage.in = buffer_at(op.in);
      if (op.code == HL_OP_ADD) stage.in2 = buffer_at(op.in2);
      if (stage.out_width > 0) stage.out = buffer_at(op.out);
      for (Prepared& form : stage.ready) form.rows = base + place(op.out, form);
      if (!multiplies(op)) continue;
      stage.from.act = act_of(*stage.weight);
      stage.from.stride = act_stride(stage.from.act, stage.in_width);
      stage.from.rows = base + place(op.in, stage.from);
    }
    program_.next.reset(new std::atomic<int32_t>[program_.stages.size()]);
    return HL_OK;
  }

  hl_program& program_;
  const Sources from_;
  std::vector<Rows> rows_;
};

}  // namespace
}  // namespace hl

extern "C" int32_t hl_program_create(hl_ctx* ctx, const hl_op* ops, int32_t n_ops, const hl_weight* weights,
                                     int32_t n_weights, const int64_t* widths, int32_t n_buffers, const hl_kv* pools,
                                     int32_t n_layers, int32_t max_tokens, hl_program** program) {
  if (program == nullptr) return hl::fail(HL_ERR_ARGUMENT, "program: no place for it");
  *program = nullptr;
  if (ctx == nullptr || ops == nullptr || widths == nullptr || (weights == nullptr && n_weights > 0) ||
      (pools == nullptr && n_layers > 0))
    return hl::fail(HL_ERR_ARGUMENT, "program: a null pointer");
  if (n_ops < 1 || n_buffers < 1 || n_weights < 0 || n_layers < 0 || max_tokens < 1)
    return hl::fail(HL_ERR_ARGUMENT, "program: %d operations, %d buffers, %d weights, %d layers, %d tokens", n_ops,
                    n_buffers, n_weights, n_layers, max_tokens);
  return hl::guarded([&]() -> int32_t {
    auto made = std::make_unique<hl_program>();
    made->ctx = ctx;
    made->weights.assign(weights, weights + n_weights);
    made->pools.assign(pools, pools + n_layers);
    made->n_ops = n_ops;
    made->max_tokens = max_tokens;
    if (const int32_t status = hl::Maker(made.get(), {ops, n_ops, widths, n_buffers}).make()) return status;
    *program = made.release();
    return HL_OK;
  });
}

extern "C" void hl_program_free(hl_program* program) { delete program; }
extern "C" int64_t hl_program_bytes(const hl_program* program) { return program->bytes; }
