// Running programs: one visit of the thread pool for a whole step.
#include <algorithm>
#include <chrono>
#include <cstring>

#include "program.h"

namespace hl {
namespace {

class Run {
 public:
  Run(hl_program& program, const hl_step& step)
      : p_(program), step_(step), ops_(*program.ctx->isa->ops), linear_(*program.ctx->isa->linear) {}

  void operator()(const Team& team) const {
    using clock = std::chrono::steady_clock;
    const bool timed = team.rank == 0 && !p_.seconds.empty();
    auto before = timed ? clock::now() : clock::time_point();
    for (size_t i = 0; i < p_.stages.size(); i++) {
      const Stage& stage = p_.stages[i];
      const int64_t rows = stage.wanted ? step_.rows : step_.tokens;
      if (rows == 0) continue;  // for every thread alike
      run(team, stage, rows, p_.next[i]);
      if (stage.barrier && i + 1 < p_.stages.size()) team.barrier();
      if (!timed) continue;
      const auto now = clock::now();
      p_.seconds[static_cast<size_t>(stage.number)] += std::chrono::duration<double>(now - before).count();
      before = now;
    }
  }

 private:
  void run(const Team& team, const Stage& stage, int64_t rows, std::atomic<int32_t>& next) const {
    switch (stage.op.code) {
      case HL_OP_LINEAR:
        return linear(team, stage, rows);
      case HL_OP_ROPE:
        return rope(team, stage, rows);
      case HL_OP_ATTEND:
        return attend(team, stage, next);
      case HL_OP_HEAD:
        return head(team, stage, rows);
      default:
        break;
    }
    const Range mine = team.split(rows);
    for (int64_t r = mine.begin; r < mine.end; r++) {
      one_row(stage, r);
      for (const Prepared& form : stage.ready)
        prepare(form, stage, r, 0, stage.out_width);
    }
  }

  // Columns [begin, end) of a row of `out`, in the form that a later product wants.
  void prepare(const Prepared& form, const Stage& stage, int64_t row, int64_t begin, int64_t end) const {
    linear_.prepare(form.act, stage.out + row * stage.out_stride + begin, begin, end, stage.out_width,
                    act_row(form.act, form.rows, form.stride, row));
  }

  void one_row(const Stage& stage, int64_t r) const {
    const hl_op& op = stage.op;
    const float* in = stage.in + r * stage.in_stride;
    float* out = stage.out + r * stage.out_stride;
    switch (op.code) {
      case HL_OP_EMBED:
        if (step_.n_embeddings > 0 && step_.embedding_rows[r] >= 0) {
          std::memcpy(out, step_.embeddings + step_.embedding_rows[r] * stage.out_width,
                      static_cast<size_t>(stage.out_width) * 4);
          return;
        }
        if (stage.weight != nullptr) return unpack_row(*stage.weight, step_.ids[r], out);
        return ops_.widen(
            op.table_kind,
            static_cast<const char*>(op.table) + step_.ids[r] * stage.out_width * (op.table_kind == HL_SRC_F32 ? 4 : 2),
            stage.out_width, out);
      case HL_OP_NORM:
        return ops_.norm(op.style, in, stage.in_width, op.gain, op.bias, op.eps, out);
      case HL_OP_GATE:
        return ops_.gate(op.style, in, in + stage.out_width, stage.out_width, out);
      case HL_OP_ADD:
        return ops_.add(in, op.scale, stage.in2 == nullptr ? nullptr : stage.in2 + r * stage.in_stride, stage.in_width,
                        out);
      case HL_OP_GATHER:
        std::memcpy(out, stage.in + step_.row_index[r] * stage.in_stride, static_cast<size_t>(stage.in_width) * 4);
        return;
      default:
        return;  // op_prepare
    }
  }

  LowRows extra(const Team& team, const Stage& stage, int64_t rows) const {
    if (!p_.adapters.any()) return {};
    return low_rows(team, linear_, p_.adapters, stage.number,
                    {stage.in, stage.in_stride, stage.in_width, rows, stage.wanted});
  }

  void linear(const Team& team, const Stage& stage, int64_t rows) const {
    const Epilogue out = {stage.out, stage.out_stride, stage.op.bias, stage.op.flags, extra(team, stage, rows)};
    const int64_t columns = stage.op.flags & HL_SILU_MUL ? HL_TILE / 2 : HL_TILE;  // that a tile becomes
    // Threads take whole groups of 32 columns, so that each can prepare what it made. With many rows that happens every
    // 128 columns, while they are in the cache.
    const int64_t grain = stage.ready.empty() ? 1 : 32 / columns;
    const Range tiles = team.split(tiles_of(*stage.weight), grain);
    const int64_t at_once = stage.ready.empty() || rows < 32 ? tiles.end - tiles.begin : 128 / columns;
    for (int64_t tile = tiles.begin; tile < tiles.end; tile += at_once) {
      const int64_t end = std::min(tiles.end, tile + at_once);
      linear_.product(*stage.weight, stage.from.rows, stage.from.stride, rows, tile, end, out);
      for (const Prepared& form : stage.ready)
        for (int64_t r = 0; r < rows; r++)
          prepare(form, stage, r, tile * columns, std::min(end * columns, stage.out_width));
    }
  }

  void rope(const Team& team, const Stage& stage, int64_t rows) const {
    const hl_op& op = stage.op;
    const hl_kv& kv = p_.pools[static_cast<size_t>(op.layer)];
    const int64_t size = op.head_size, share = op.heads / op.kv_heads, half = op.rotary / 2;
    const Range mine = team.split(rows * op.kv_heads);  // head by head
    for (int64_t i = mine.begin; i < mine.end;) {
      const int32_t g = static_cast<int32_t>(i / rows);
      const int64_t t = i % rows, slot = step_.slots[t], most = std::min(rows - t, mine.end - i);
      int64_t count = 1;  // of tokens whose slots lie together
      while (count < most && step_.slots[t + count] == slot + count && (slot + count) % HL_SLOTS != 0) count++;
      // Those of another sequence are elsewhere in memory.
      if (const int64_t ahead = i + 2; count == 1 && ahead < mine.end)
        kv_fetch(kv, step_.slots[ahead % rows], ahead / rows);
      float* first = stage.in + t * stage.in_stride;
      for (int64_t n = 0; n < count && op.rotary > 0; n++) {
        float* row = first + n * stage.in_stride;
        const float *cosines = step_.cos + (t + n) * half, *sines = step_.sin + (t + n) * half;
        for (int64_t h = g * share; h < (g + 1) * share; h++)
          ops_.rope(op.style, row + h * size, op.rotary, cosines, sines);
        ops_.rope(op.style, row + (op.heads + g) * size, op.rotary, cosines, sines);
      }
      const float* k = first + (op.heads + g) * size;
      ops_.kv_write(kv, slot, count, g, {k, k + op.kv_heads * size, stage.in_stride, stage.in_stride});
      i += count;
    }
  }

  void attend(const Team& team, const Stage& stage, std::atomic<int32_t>& next) const {
    const hl_op& op = stage.op;
    const hl_kv& kv = p_.pools[static_cast<size_t>(op.layer)];
    const Attention what = {&kv,       &step_,          op.heads,  op.scale, stage.in, stage.in_stride,
                            stage.out, stage.out_stride, partials()};
    const int64_t share = op.heads / op.kv_heads;
    const auto done = [&](const AttendTask& task) {
      for (const Prepared& form : stage.ready)
        for (int64_t r = task.row0; r < task.row1; r++) {
          const int64_t token = step_.query_start[task.sequence] + r / share, head = task.kv_head * share + r % share;
          prepare(form, stage, token, head * op.head_size, (head + 1) * op.head_size);
        }
    };
    attend_some(ops_, what, p_.plan, next, p_.attend_scratch + team.rank * p_.attend_bytes, done);
    if (p_.plan.merges.empty()) return;
    team.barrier();
    merge_some(team, ops_, what, p_.plan, done);
  }
  float* partials() const { return static_cast<float*>(p_.partials.reserve(0)); }

  void head(const Team& team, const Stage& stage, int64_t rows) const {
    const hl_weight& weight = *stage.weight;
    const Range tiles = team.split(tiles_of(weight));
    const int64_t scored = rows - step_.states;
    if (scored > 0)
      linear_.product(weight, stage.from.rows, stage.from.stride, scored, tiles.begin, tiles.end,
                      {step_.logits, weight.out, stage.op.bias, 0, extra(team, stage, scored)});
    if (step_.hidden != nullptr) {
      const Range mine = team.split(rows);
      for (int64_t r = mine.begin; r < mine.end; r++)
        std::copy_n(stage.in + r * stage.in_stride, stage.in_width, step_.hidden + r * stage.in_width);
    }
    if (scored == 0 || (step_.top == 0 && step_.log_sum_exp == nullptr)) return;
    team.barrier();
    top_rows(team, ops_,
             {step_.logits, weight.out, scored, weight.out, step_.top, step_.top_values, step_.top_ids, step_.log_sum_exp,
              p_.top.reserve(0)});
  }

  hl_program& p_;
  const hl_step& step_;
  const OpKernels& ops_;
  const LinearKernels& linear_;
};

int32_t check(const hl_program& p, const hl_step& step) {
  if (step.tokens < 0 || step.tokens > p.max_tokens)
    return fail(HL_ERR_ARGUMENT, "step: %d tokens, the program takes up to %d", step.tokens, p.max_tokens);
  if (step.rows < 0 || step.rows > step.tokens)
    return fail(HL_ERR_ARGUMENT, "step: %d of %d tokens are wanted", step.rows, step.tokens);
  if (step.tokens == 0) return HL_OK;
  if (step.ids == nullptr || (!p.pools.empty() && step.slots == nullptr) ||
      (p.rotary > 0 && (step.cos == nullptr || step.sin == nullptr)))
    return fail(HL_ERR_ARGUMENT, "step: ids, slots, cos or sin is missing");
  for (int32_t t = 0; p.vocabulary > 0 && t < step.tokens; t++)
    if (step.ids[t] < 0 || step.ids[t] >= p.vocabulary)
      return fail(HL_ERR_ARGUMENT, "step: token %d has id %d, the vocabulary has %d", t, step.ids[t], p.vocabulary);
  if (step.n_embeddings < 0 || (step.n_embeddings > 0 && (step.embeddings == nullptr || step.embedding_rows == nullptr)))
    return fail(HL_ERR_ARGUMENT, "step: %d embeddings, but no rows of them", step.n_embeddings);
  for (int32_t t = 0; step.n_embeddings > 0 && t < step.tokens; t++)
    if (step.embedding_rows[t] < -1 || step.embedding_rows[t] >= step.n_embeddings)
      return fail(HL_ERR_ARGUMENT, "step: token %d has embedding %d of %d", t, step.embedding_rows[t], step.n_embeddings);
  if (!p.pools.empty()) {
    const int64_t slots = int64_t{p.pools[0].blocks} * p.pools[0].block_size;
    for (int32_t t = 0; t < step.tokens; t++)
      if (step.slots[t] < 0 || step.slots[t] >= slots)
        return fail(HL_ERR_ARGUMENT, "step: token %d has slot %lld of %lld", t, static_cast<long long>(step.slots[t]),
                    static_cast<long long>(slots));
    if (const int32_t status = check_attention(step, p.pools[0].blocks, p.pools[0].block_size)) return status;
  }
  if (step.rows == 0) return HL_OK;
  if (step.states < 0 || step.states > step.rows)
    return fail(HL_ERR_ARGUMENT, "step: %d of %d wanted tokens want no logits", step.states, step.rows);
  if (step.row_index == nullptr || (step.logits == nullptr && step.states < step.rows) ||
      (step.hidden == nullptr && step.states > 0))
    return fail(HL_ERR_ARGUMENT, "step: row_index, logits or hidden is missing");
  for (int32_t r = 0; r < step.rows; r++)
    if (step.row_index[r] < 0 || step.row_index[r] >= step.tokens)
      return fail(HL_ERR_ARGUMENT, "step: row %d is token %d of %d", r, step.row_index[r], step.tokens);
  if (step.top < 0 || step.top > HL_MOST_TOP || step.top > p.head_out)
    return fail(HL_ERR_ARGUMENT, "step: the top %d of %lld logits; at most %d", step.top,
                static_cast<long long>(p.head_out), HL_MOST_TOP);
  if (step.top > 0 && (step.top_values == nullptr || step.top_ids == nullptr))
    return fail(HL_ERR_ARGUMENT, "step: top_values or top_ids is missing");
  return HL_OK;
}

}  // namespace
}  // namespace hl

extern "C" int32_t hl_program_run(hl_program* program, const hl_step* step) {
  if (program == nullptr || step == nullptr) return hl::fail(HL_ERR_ARGUMENT, "run: a null pointer");
  return hl::guarded([&]() -> int32_t {
    hl_program& p = *program;
    std::lock_guard<std::mutex> lock(p.ctx->busy);
    if (const int32_t status = hl::check(p, *step)) return status;
    if (step->tokens == 0) return HL_OK;
    if (const int32_t status = p.adapters.take(*step, p.n_ops)) return status;
    if (p.heads > 0) p.plan.make(*step, p.heads, p.pools[0], p.ctx->pool.size());
    p.partials.reserve(p.plan.partial_floats * 4);
    if (step->rows > 0 && (step->top > 0 || step->log_sum_exp != nullptr))
      p.top.reserve(hl::top_scratch(step->rows, p.head_out, step->top));
    for (size_t i = 0; i < p.stages.size(); i++) p.next[i].store(0, std::memory_order_relaxed);
    p.ctx->pool.run(hl::Run(p, *step));
    return HL_OK;
  });
}

extern "C" int32_t hl_program_profile(hl_program* program, double* seconds) {
  if (program == nullptr) return hl::fail(HL_ERR_ARGUMENT, "profile: a null pointer");
  return hl::guarded([&]() -> int32_t {
    std::lock_guard<std::mutex> lock(program->ctx->busy);
    if (seconds == nullptr) {
      program->seconds.clear();
      return HL_OK;
    }
    program->seconds.resize(static_cast<size_t>(program->n_ops), 0.0);
    std::copy(program->seconds.begin(), program->seconds.end(), seconds);
    std::fill(program->seconds.begin(), program->seconds.end(), 0.0);
    return HL_OK;
  });
}
