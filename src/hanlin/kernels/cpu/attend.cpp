// The C ABI of the pool and of attention, and how a step's attention is shared out among threads.
#include <algorithm>

#include "step.h"

namespace hl {

const char* kv_problem(const hl_kv& kv) {
  if (kv.kind < HL_KV_F32 || kv.kind > HL_KV_INT4) return "unknown kind";
  if (kv.blocks < 1 || kv.heads < 1) return "blocks and heads must be >= 1";
  if (kv.block_size < HL_SLOTS || kv.block_size % HL_SLOTS != 0 || kv.block_size > 1024)
    return "block_size must be a multiple of 16 up to 1024";
  if (kv.head_size < 2 || kv.head_size % 2 != 0 || kv.head_size > most_head) return "head_size must be even, in 2..512";
  return nullptr;
}

int32_t check_attention(const hl_step& step, int32_t blocks, int32_t block_size) {
  if (step.tokens < 0 || step.sequences < 0 || step.max_blocks < 0)
    return fail(HL_ERR_ARGUMENT, "step: tokens, sequences and max_blocks must not be negative");
  if (step.sequences == 0)
    return step.tokens == 0 ? HL_OK : fail(HL_ERR_ARGUMENT, "step: %d tokens of no sequence", step.tokens);
  if (step.query_start == nullptr || step.context == nullptr || step.block_table == nullptr)
    return fail(HL_ERR_ARGUMENT, "step: query_start, context or block_table is missing");
  if (step.query_start[0] != 0 || step.query_start[step.sequences] != step.tokens)
    return fail(HL_ERR_ARGUMENT, "step: query_start must go from 0 to %d, not from %d to %d", step.tokens,
                step.query_start[0], step.query_start[step.sequences]);
  for (int32_t s = 0; s < step.sequences; s++) {
    const int64_t queries = int64_t{step.query_start[s + 1]} - step.query_start[s], context = step.context[s];
    if (queries < 0 || queries > context)
      return fail(HL_ERR_ARGUMENT, "step: sequence %d has %lld new tokens in a context of %lld", s,
                  static_cast<long long>(queries), static_cast<long long>(context));
    const int64_t prefix = step.prefix_len == nullptr ? 0 : step.prefix_len[s];
    if (prefix < 0 || prefix > context)
      return fail(
          HL_ERR_ARGUMENT,
          "step: sequence %d has a prefix of %lld in a context of %lld; the prefix must be computed in one step", s,
          static_cast<long long>(prefix), static_cast<long long>(context));
    const int64_t used = (context + block_size - 1) / block_size;
    if (used > step.max_blocks)
      return fail(HL_ERR_ARGUMENT, "step: sequence %d needs %lld blocks, block_table has %d", s,
                  static_cast<long long>(used), step.max_blocks);
    const int32_t* table = step.block_table + int64_t{s} * step.max_blocks;
    for (int64_t b = 0; b < used; b++)
      if (table[b] < 0 || table[b] >= blocks)
        return fail(HL_ERR_ARGUMENT, "step: sequence %d names block %d of %d", s, table[b], blocks);
  }
  return HL_OK;
}

namespace {

int64_t spans_of(int64_t keys) { return (keys + HL_SPAN - 1) / HL_SPAN; }

}  // namespace

void AttendPlan::make(const hl_step& step, int32_t heads, const hl_kv& kv, int threads) {
  tasks.clear();
  merges.clear();
  merged_rows = partial_floats = 0;
  const int32_t share = heads / kv.heads;
  int64_t whole_tasks = 0;
  for (int32_t s = 0; s < step.sequences; s++) {
    const int64_t rows = (int64_t{step.query_start[s + 1]} - step.query_start[s]) * share;
    whole_tasks += kv.heads * ((rows + attend_rows - 1) / attend_rows);
  }
  // With few tasks, those of long sequences are cut into spans.
  const int64_t wanted = threads == 1 ? 0 : int64_t{6} * threads;
  const bool cut = whole_tasks < wanted;
  for (int32_t s = 0; s < step.sequences; s++) {
    const int64_t queries = int64_t{step.query_start[s + 1]} - step.query_start[s], rows = queries * share;
    const int64_t before = step.context[s] - queries;
    for (int64_t row0 = 0; row0 < rows; row0 += attend_rows) {
      const int64_t row1 = std::min<int64_t>(rows, row0 + attend_rows);
      const int64_t spans = spans_of(visible(step, s, before + (row1 - 1) / share));  // later tokens see no less
      const int64_t pieces = cut ? std::min(spans, (wanted + whole_tasks - 1) / whole_tasks) : 1;
      for (int32_t h = 0; h < kv.heads; h++) {
        AttendTask task = {s, h, static_cast<int32_t>(row0), static_cast<int32_t>(row1), 0, static_cast<int32_t>(spans),
                           -1};
        if (pieces == 1) {
          tasks.push_back(task);
          continue;
        }
        const int64_t record = hl::partial_floats(kv.head_size) * (row1 - row0);
        task.partial = partial_floats;
        merges.push_back(task);
        merged_rows += row1 - row0;
        for (int64_t p = 0; p < pieces; p++) {
          task.span0 = static_cast<int32_t>(spans * p / pieces);
          task.span1 = static_cast<int32_t>(spans * (p + 1) / pieces);
          task.partial = partial_floats + task.span0 * record;
          tasks.push_back(task);
        }
        partial_floats += spans * record;
      }
    }
  }
  const auto cost = [](const AttendTask& t) { return int64_t{t.row1 - t.row0} * (t.span1 - t.span0); };
  std::stable_sort(tasks.begin(), tasks.end(),
                   [&](const AttendTask& a, const AttendTask& b) { return cost(a) > cost(b); });
}

namespace {

// Calls body(slot, head, token) for all slots and heads, shared out among the team by tokens.
template <class Body>
int32_t each_slot(const char* call, hl_ctx* ctx, const hl_kv* kv, const int64_t* slots, int64_t tokens, const void* k,
                  int64_t ldk, const void* v, int64_t ldv, const Body& body) {
  if (ctx == nullptr || kv == nullptr || kv->data == nullptr || slots == nullptr || k == nullptr || v == nullptr)
    return fail(HL_ERR_ARGUMENT, "%s: a null pointer", call);
  if (const char* problem = kv_problem(*kv)) return fail(HL_ERR_ARGUMENT, "%s: pool: %s", call, problem);
  const int64_t width = int64_t{kv->heads} * kv->head_size, most = int64_t{kv->blocks} * kv->block_size;
  if (tokens < 0 || ldk < width || ldv < width)
    return fail(HL_ERR_ARGUMENT, "%s: rows of keys and values are too short", call);
  for (int64_t t = 0; t < tokens; t++)
    if (slots[t] < 0 || slots[t] >= most)
      return fail(HL_ERR_ARGUMENT, "%s: slot %lld of %lld", call, static_cast<long long>(slots[t]),
                  static_cast<long long>(most));
  return guarded([&]() -> int32_t {
    std::lock_guard<std::mutex> lock(ctx->busy);
    ctx->pool.run([&](const Team& team) {
      const Range mine = team.split(tokens);
      for (int64_t t = mine.begin; t < mine.end; t++)
        for (int32_t h = 0; h < kv->heads; h++) body(slots[t], h, t);
    });
    return HL_OK;
  });
}

}  // namespace
}  // namespace hl

extern "C" int64_t hl_kv_bytes(int32_t kind, int32_t blocks, int32_t block_size, int32_t heads, int32_t head_size) {
  const hl_kv kv = {kind, blocks, block_size, heads, head_size, nullptr};
  if (const char* problem = hl::kv_problem(kv)) return hl::fail(HL_ERR_ARGUMENT, "pool: %s", problem);
  const int64_t block = hl::kv_block_bytes(kv);
  if (block > INT64_MAX / blocks) return hl::fail(HL_ERR_ARGUMENT, "pool: too large");
  return block * blocks;
}

extern "C" int32_t hl_kv_write(hl_ctx* ctx, const hl_kv* kv, const int64_t* slots, int64_t tokens, const float* k,
                               int64_t ldk, const float* v, int64_t ldv) {
  return hl::each_slot("kv_write", ctx, kv, slots, tokens, k, ldk, v, ldv, [&](int64_t slot, int32_t head, int64_t t) {
    const int64_t at = int64_t{head} * kv->head_size;
    ctx->isa->ops->kv_write(*kv, slot, 1, head, {k + t * ldk + at, v + t * ldv + at, ldk, ldv});
  });
}

extern "C" int32_t hl_kv_read(hl_ctx* ctx, const hl_kv* kv, const int64_t* slots, int64_t tokens, float* k, int64_t ldk,
                              float* v, int64_t ldv) {
  return hl::each_slot("kv_read", ctx, kv, slots, tokens, k, ldk, v, ldv, [&](int64_t slot, int32_t head, int64_t t) {
    const int64_t at = int64_t{head} * kv->head_size;
    ctx->isa->ops->kv_read(*kv, slot, head, k + t * ldk + at, v + t * ldv + at);
  });
}

extern "C" int32_t hl_kv_copy(hl_ctx* ctx, const hl_kv* target, const int32_t* to, const hl_kv* source,
                              const int32_t* from, int64_t n) {
  if (ctx == nullptr || target == nullptr || source == nullptr || to == nullptr || from == nullptr ||
      target->data == nullptr || source->data == nullptr)
    return hl::fail(HL_ERR_ARGUMENT, "kv_copy: a null pointer");
  for (const hl_kv* kv : {target, source})
    if (const char* problem = hl::kv_problem(*kv)) return hl::fail(HL_ERR_ARGUMENT, "kv_copy: pool: %s", problem);
  if (target->kind != source->kind || target->block_size != source->block_size || target->heads != source->heads ||
      target->head_size != source->head_size)
    return hl::fail(HL_ERR_ARGUMENT, "kv_copy: the pools differ in kind or shape");
  for (int64_t i = 0; i < n; i++)
    if (to[i] < 0 || to[i] >= target->blocks || from[i] < 0 || from[i] >= source->blocks)
      return hl::fail(HL_ERR_ARGUMENT, "kv_copy: block %d to %d, of %d and %d", from[i], to[i], source->blocks,
                      target->blocks);
  return hl::guarded([&]() -> int32_t {
    std::lock_guard<std::mutex> lock(ctx->busy);
    const int64_t bytes = hl::kv_block_bytes(*target);
    ctx->pool.run([&](const hl::Team& team) {
      const hl::Range mine = team.split(n);
      for (int64_t i = mine.begin; i < mine.end; i++)
        std::copy_n(static_cast<const uint8_t*>(source->data) + from[i] * bytes, bytes,
                    static_cast<uint8_t*>(target->data) + to[i] * bytes);
    });
    return HL_OK;
  });
}

extern "C" int32_t hl_attend(hl_ctx* ctx, const hl_kv* kv, const hl_step* step, int32_t heads, float scale,
                             const float* q, int64_t ldq, float* out, int64_t ldo) {
  if (ctx == nullptr || kv == nullptr || kv->data == nullptr || step == nullptr || q == nullptr || out == nullptr)
    return hl::fail(HL_ERR_ARGUMENT, "attend: a null pointer");
  if (const char* problem = hl::kv_problem(*kv)) return hl::fail(HL_ERR_ARGUMENT, "attend: pool: %s", problem);
  if (heads < kv->heads || heads % kv->heads != 0)
    return hl::fail(HL_ERR_ARGUMENT, "attend: %d heads are no multiple of %d kv heads", heads, kv->heads);
  const int64_t width = int64_t{heads} * kv->head_size;
  if (ldq < width || ldo < width)
    return hl::fail(HL_ERR_ARGUMENT, "attend: rows of q and out must have %lld floats", static_cast<long long>(width));
  if (const int32_t status = hl::check_attention(*step, kv->blocks, kv->block_size)) return status;
  return hl::guarded([&]() -> int32_t {
    std::lock_guard<std::mutex> lock(ctx->busy);
    const hl::OpKernels& kernels = *ctx->isa->ops;
    hl::AttendPlan plan;
    plan.make(*step, heads, *kv, ctx->pool.size());
    const int64_t own = kernels.attend_scratch(*kv);
    char* scratch = static_cast<char*>(ctx->scratch.reserve(own * ctx->pool.size() + plan.partial_floats * 4));
    float* partials = reinterpret_cast<float*>(scratch + own * ctx->pool.size());
    const hl::Attention what = {kv, step, heads, scale, q, ldq, out, ldo, partials};
    std::atomic<int32_t> next{0};
    ctx->pool.run([&](const hl::Team& team) {
      const auto ignore = [](const hl::AttendTask&) {};
      hl::attend_some(kernels, what, plan, next, scratch + own * team.rank, ignore);
      if (plan.merges.empty()) return;
      team.barrier();
      hl::merge_some(team, kernels, what, plan, ignore);
    });
    return HL_OK;
  });
}
