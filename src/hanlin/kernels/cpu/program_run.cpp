// Running programs: one visit of the thread pool for a whole step.
#include <algorithm>
#include <chrono>
#include <cstring>

#include "program.h"

namespace hl {
namespace {

// Inputs [begin, end) of a row, prepared; begin is a multiple of 32. LinearKernels::prepare fills a row up to 64 bytes
// behind its end, where another thread's part may begin: 128 inputs are a whole number of 64 bytes in every form, what
// is left goes by way of a copy.
void prepare_part(const LinearKernels& kernels, const Prepared& form, const float* x, int64_t begin, int64_t end,
                  int64_t row) {
  char* to = form.rows + row * form.stride;
  const auto bytes = [&](int64_t n) { return act_bytes(form.act, n); };
  constexpr int64_t step = 128;
  const int64_t whole = begin + (end - begin) / step * step;
  if (whole > begin) kernels.prepare(form.act, x + begin, whole - begin, to + bytes(begin));
  if (whole == end) return;
  alignas(64) char part[step * 4];
  kernels.prepare(form.act, x + whole, end - whole, part);
  std::memcpy(to + bytes(whole), part, static_cast<size_t>(bytes(end - whole)));
}

class Run {
 public:
  Run(hl_program& program, const hl_step& step)
      : p_(program), step_(step), ops_(*program.ctx->isa->ops), linear_(*program.ctx->isa->linear) {
    const hl_weight* head = p_.stages.back().weight;
    top_ = {step.logits,     head->out,    step.rows,        head->out,        step.top,
            step.top_values, step.top_ids, step.log_sum_exp, p_.top.reserve(0)};
  }

  // Cuts every part into chunks.
  void share_out() {
    const int ranks = p_.ctx->pool.size();
    for (size_t i = 0; i < p_.parts.size(); i++) {
      Part& part = p_.parts[i];
      measure(part, ranks);
      p_.shares[i].reset((part.n + part.unit - 1) / part.unit, ranks);
    }
  }

  void operator()(const Team& team) const {
    using clock = std::chrono::steady_clock;
    const bool timed = team.rank == 0 && !p_.seconds.empty();
    auto before = timed ? clock::now() : clock::time_point();
    for (size_t i = 0; i < p_.parts.size(); i++) {
      const Part& part = p_.parts[i];
      if (part.n == 0) continue;
      Shares& shares = p_.shares[i];
      shares.work(team.rank, team.size, [&](int64_t chunk) {
        const int64_t begin = chunk * part.unit;
        run(team, part, begin, std::min(part.n, begin + part.unit));
      });
      shares.wait();
      if (!timed) continue;
      const auto now = clock::now();
      p_.seconds[static_cast<size_t>(p_.stages[part.last].number)] +=
          std::chrono::duration<double>(now - before).count();
      before = now;
    }
  }

 private:
  // How much there is to do in this step, and how much of it is worth a chunk: enough to make the taking of it cheap,
  // little enough that nobody waits long for the last one.
  void measure(Part& part, int ranks) const {
    const Stage& stage = p_.stages[part.first];
    const int64_t rows = stage.wanted ? step_.rows : step_.tokens;
    const bool tops = step_.rows > 0 && (step_.top > 0 || step_.log_sum_exp != nullptr);
    part.unit = 1;
    switch (part.work) {
      case Work::rows:
        part.n = rows;
        part.unit = std::max<int64_t>(1, std::min<int64_t>(16, rows / (4 * ranks)));
        return;
      case Work::linear:
      case Work::head: {
        // Whole groups of 32 columns, so that a thread can prepare what it made; with many rows 128 columns at once,
        // while they are in the cache.
        const int64_t grain = stage.ready.empty() ? 1 : 32 / columns_of(stage);
        constexpr int64_t worth = 32 << 10;
        part.n = rows == 0 ? 0 : tiles_of(*stage.weight);
        part.unit = (worth + tile_bytes(*stage.weight) - 1) / tile_bytes(*stage.weight);
        if (rows >= 32) part.unit = 128 / columns_of(stage);
        part.unit = (part.unit + grain - 1) / grain * grain;
        return;
      }
      case Work::rope:  // tokens that share cache lines of the pool are written by one thread
        part.n = rows * stage.op.kv_heads;
        part.unit = rows >= 2 * HL_SLOTS * ranks ? HL_SLOTS * stage.op.kv_heads : 1;
        return;
      case Work::attend:
        part.n = static_cast<int64_t>(p_.plan.tasks.size());
        return;
      case Work::merge:
        part.n = static_cast<int64_t>(p_.plan.merge_rows.size());
        return;
      case Work::top:
        part.n = tops ? top_chunks(top_) : 0;
        return;
      case Work::top_merge:
        part.n = tops ? rows : 0;
        return;
    }
  }

  // Columns that a tile becomes.
  static int64_t columns_of(const Stage& stage) { return stage.op.flags & HL_SILU_MUL ? HL_TILE / 2 : HL_TILE; }

  void run(const Team& team, const Part& part, int64_t begin, int64_t end) const {
    const Stage& stage = p_.stages[part.first];
    switch (part.work) {
      case Work::rows:
        return rows(part, begin, end);
      case Work::linear:
        return linear(stage, begin, end);
      case Work::rope:
        return rope(stage, begin, end);
      case Work::attend:
        return attend(team, stage, begin);
      case Work::merge:
        return merge(stage, begin);
      case Work::head:
        return head(stage, begin, end);
      case Work::top:
        return top_chunk(ops_, top_, begin);
      case Work::top_merge:
        return top_merge(top_, begin);
    }
  }

  void rows(const Part& part, int64_t begin, int64_t end) const {
    for (int64_t r = begin; r < end; r++)
      for (size_t i = part.first; i <= part.last; i++) {
        const Stage& stage = p_.stages[i];
        one_row(stage, r);
        for (const Prepared& form : stage.ready)
          linear_.prepare(form.act, stage.out + r * stage.out_width, stage.out_width, form.rows + r * form.stride);
      }
  }

  void one_row(const Stage& stage, int64_t r) const {
    const hl_op& op = stage.op;
    const float* in = stage.in + r * stage.in_width;
    float* out = stage.out + r * stage.out_width;
    switch (op.code) {
      case HL_OP_EMBED:
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
        return ops_.add(in, op.scale, stage.in2 == nullptr ? nullptr : stage.in2 + r * stage.in_width, stage.in_width,
                        out);
      case HL_OP_GATHER:
        std::memcpy(out, stage.in + step_.row_index[r] * stage.in_width, static_cast<size_t>(stage.in_width) * 4);
        return;
      default:
        return;  // op_prepare
    }
  }

  void linear(const Stage& stage, int64_t tile, int64_t end) const {
    const int64_t rows = stage.wanted ? step_.rows : step_.tokens, columns = columns_of(stage);
    linear_.product(*stage.weight, stage.from.rows, stage.from.stride, rows, tile, end,
                    {stage.out, stage.out_width, stage.op.bias, stage.op.flags});
    for (const Prepared& form : stage.ready)
      for (int64_t r = 0; r < rows; r++)
        prepare_part(linear_, form, stage.out + r * stage.out_width, tile * columns,
                     std::min(end * columns, stage.out_width), r);
  }

  void rope(const Stage& stage, int64_t begin, int64_t end) const {
    const hl_op& op = stage.op;
    const hl_kv& kv = p_.pools[static_cast<size_t>(op.layer)];
    const int64_t size = op.head_size, share = op.heads / op.kv_heads, half = op.rotary / 2;
    for (int64_t i = begin; i < end; i++) {
      const int64_t t = i / op.kv_heads;
      const int32_t g = static_cast<int32_t>(i % op.kv_heads);
      float* row = stage.in + t * stage.in_width;
      float* k = row + (op.heads + g) * size;
      if (op.rotary > 0) {
        const float *cosines = step_.cos + t * half, *sines = step_.sin + t * half;
        for (int64_t h = g * share; h < (g + 1) * share; h++)
          ops_.rope(op.style, row + h * size, op.rotary, cosines, sines);
        ops_.rope(op.style, k, op.rotary, cosines, sines);
      }
      ops_.kv_write(kv, step_.slots[t], g, k, k + op.kv_heads * size);
    }
  }

  Attention attention(const Stage& stage) const {
    const hl_kv& kv = p_.pools[static_cast<size_t>(stage.op.layer)];
    return {&kv,
            &step_,
            stage.op.heads,
            stage.op.scale,
            stage.in,
            stage.in_width,
            stage.out,
            stage.out_width,
            static_cast<float*>(p_.partials.reserve(0))};
  }

  void attend(const Team& team, const Stage& stage, int64_t number) const {
    const AttendTask& task = p_.plan.tasks[static_cast<size_t>(number)];
    ops_.attend(attention(stage), task, p_.attend_scratch + team.rank * p_.attend_bytes);
    if (task.partial >= 0) return;
    for (int32_t r = task.row0; r < task.row1; r++) attended(stage, task, r);
  }

  void merge(const Stage& stage, int64_t number) const {
    const auto [index, row] = p_.plan.merge_rows[static_cast<size_t>(number)];
    const AttendTask& task = p_.plan.merges[static_cast<size_t>(index)];
    ops_.merge(attention(stage), task, row);
    attended(stage, task, row);
  }

  // Prepares the head that a row of a task is.
  void attended(const Stage& stage, const AttendTask& task, int64_t row) const {
    const hl_op& op = stage.op;
    const int64_t share = op.heads / op.kv_heads, head = task.kv_head * share + row % share;
    const int64_t token = step_.query_start[task.sequence] + row / share;
    for (const Prepared& form : stage.ready)
      prepare_part(linear_, form, stage.out + token * stage.out_width, head * op.head_size, (head + 1) * op.head_size,
                   token);
  }

  void head(const Stage& stage, int64_t tile, int64_t end) const {
    linear_.product(*stage.weight, stage.from.rows, stage.from.stride, step_.rows, tile, end,
                    {step_.logits, stage.weight->out, stage.op.bias, 0});
    if (step_.hidden != nullptr && tile == 0) std::copy_n(stage.in, step_.rows * stage.in_width, step_.hidden);
  }

  hl_program& p_;
  const hl_step& step_;
  const OpKernels& ops_;
  const LinearKernels& linear_;
  TopRows top_;
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
  if (!p.pools.empty()) {
    const int64_t slots = int64_t{p.pools[0].blocks} * p.pools[0].block_size;
    for (int32_t t = 0; t < step.tokens; t++)
      if (step.slots[t] < 0 || step.slots[t] >= slots)
        return fail(HL_ERR_ARGUMENT, "step: token %d has slot %lld of %lld", t, static_cast<long long>(step.slots[t]),
                    static_cast<long long>(slots));
    if (const int32_t status = check_attention(step, p.pools[0].blocks, p.pools[0].block_size)) return status;
  }
  if (step.rows == 0) return HL_OK;
  if (step.row_index == nullptr || step.logits == nullptr)
    return fail(HL_ERR_ARGUMENT, "step: row_index or logits is missing");
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
    if (p.heads > 0) p.plan.make(*step, p.heads, p.pools[0], p.ctx->pool.size());
    p.partials.reserve(p.plan.partial_floats * 4);
    if (step->rows > 0 && (step->top > 0 || step->log_sum_exp != nullptr))
      p.top.reserve(hl::top_scratch(step->rows, p.head_out, step->top));
    hl::Run run(p, *step);
    run.share_out();
    p.ctx->pool.run(run);
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
