#include "linear.h"

#include "context.h"

namespace hl {

const char* weight_problem(const hl_weight& w) {
  constexpr int64_t most = int64_t{1} << 31;
  if (w.kind < HL_F32 || w.kind > HL_INT4_ZERO) return "unknown kind";
  if (w.out < 1 || w.in < 1 || w.out >= most || w.in >= most) return "out and in must be in 1..2^31-1";
  if (w.kind >= HL_INT8_ROW && w.in > most_whole) return "integer kinds take up to 65536 inputs";
  if (!is_grouped(w.kind)) return w.group == 0 ? nullptr : "group must be 0 for this kind";
  if (w.group != 32 && w.group != 64 && w.group != 128) return "group must be 32, 64 or 128";
  return w.in % w.group == 0 ? nullptr : "in must be a multiple of group";
}

void linear(const Team& team, const LinearKernels& k, const hl_weight& w, const float* x, int64_t ldx, int64_t rows,
            void* scratch, const Epilogue& out) {
  const Act act = act_of(w);
  const int64_t stride = act_stride(act, w.in);
  const Range mine = team.split(rows);
  for (int64_t r = mine.begin; r < mine.end; r++)
    k.prepare(act, x + r * ldx, 0, w.in, w.in, act_row(act, static_cast<char*>(scratch), stride, r));
  team.barrier();
  const Range tiles = team.split(tiles_of(w));
  k.product(w, scratch, stride, rows, tiles.begin, tiles.end, out);
}

}  // namespace hl

extern "C" int64_t hl_packed_bytes(int32_t kind, int64_t out, int64_t in, int32_t group) {
  const hl_weight w = {kind, group, out, in, nullptr};
  if (const char* problem = hl::weight_problem(w)) return hl::fail(HL_ERR_ARGUMENT, "weight: %s", problem);
  const int64_t tile = hl::tile_bytes(w);
  if (hl::tiles_of(w) > (INT64_MAX >> 1) / tile) return hl::fail(HL_ERR_ARGUMENT, "weight: too large");
  return hl::tiles_of(w) * tile;
}

extern "C" int32_t hl_linear(hl_ctx* ctx, const hl_weight* weight, const float* x, int64_t ldx, int64_t rows, float* y,
                             int64_t ldy, const float* bias, int32_t flags) {
  if (ctx == nullptr || weight == nullptr || x == nullptr || y == nullptr || weight->data == nullptr)
    return hl::fail(HL_ERR_ARGUMENT, "linear: a null pointer");
  if (const char* problem = hl::weight_problem(*weight))
    return hl::fail(HL_ERR_ARGUMENT, "linear: weight: %s", problem);
  if (flags & ~(HL_ADD | HL_SILU_MUL | HL_GELU) || (flags & HL_SILU_MUL && flags & HL_GELU))
    return hl::fail(HL_ERR_ARGUMENT, "linear: flags %d make no sense", flags);
  if (flags & HL_SILU_MUL && weight->out % HL_TILE != 0)
    return hl::fail(HL_ERR_ARGUMENT, "linear: SILU_MUL needs a multiple of %d outputs, not %lld", HL_TILE,
                    static_cast<long long>(weight->out));
  const int64_t columns = flags & HL_SILU_MUL ? weight->out / 2 : weight->out;
  if (rows < 0 || ldx < weight->in || ldy < columns)
    return hl::fail(HL_ERR_ARGUMENT, "linear: %lld rows, ldx %lld (in %lld), ldy %lld (%lld columns)",
                    static_cast<long long>(rows), static_cast<long long>(ldx), static_cast<long long>(weight->in),
                    static_cast<long long>(ldy), static_cast<long long>(columns));
  if (rows == 0) return HL_OK;
  return hl::guarded([&]() -> int32_t {
    std::lock_guard<std::mutex> lock(ctx->busy);
    void* scratch = ctx->scratch.reserve(hl::whole_rows(rows) * hl::act_stride(hl::act_of(*weight), weight->in));
    const hl::Epilogue out = {y, ldy, bias, flags};
    ctx->pool.run(
        [&](const hl::Team& team) { hl::linear(team, *ctx->isa->linear, *weight, x, ldx, rows, scratch, out); });
    return HL_OK;
  });
}
