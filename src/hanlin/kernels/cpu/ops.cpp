// The C ABI of what is done to rows one by one: norms, activations, rotations, selections.
#include <cmath>
#include <limits>

#include "step.h"

namespace hl {
namespace {

// Columns that one thread selects from at a time. Part of the definition of log_sum_exp's bits, so it never changes
// with threads or rows.
constexpr int64_t top_columns = 8192;

int64_t top_chunks(int64_t columns) { return (columns + top_columns - 1) / top_columns; }
// A chunk's k values, k ids, and Top's two floats.
int64_t top_record(int32_t k) { return (int64_t{2} * k + 2) * 4; }

void merge_top(const TopRows& what, int64_t row) {
  const int64_t chunks = top_chunks(what.columns);
  const char* records = static_cast<const char*>(what.parts) + row * chunks * top_record(what.k);
  const auto values = [&](int64_t c) { return reinterpret_cast<const float*>(records + c * top_record(what.k)); };
  const auto ids = [&](int64_t c) { return reinterpret_cast<const int32_t*>(values(c) + what.k); };
  if (what.k > 0) {
    // Chunks are in the order of their columns, so of equal values the one found first has the lowest column.
    float* to = what.values + row * what.k;
    int32_t* to_ids = what.ids + row * what.k;
    int32_t kept = 0;
    for (int64_t c = 0; c < chunks; c++)
      for (int32_t i = 0; i < what.k && ids(c)[i] >= 0; i++) {
        const float value = values(c)[i];
        if (kept == what.k && !(value > to[kept - 1])) break;
        int32_t at = kept < what.k ? kept : what.k - 1;
        for (; at > 0 && to[at - 1] < value; at--) {
          to[at] = to[at - 1];
          to_ids[at] = to_ids[at - 1];
        }
        to[at] = value;
        to_ids[at] = ids(c)[i];
        if (kept < what.k) kept++;
      }
    for (; kept < what.k; kept++) {
      to[kept] = -std::numeric_limits<float>::infinity();
      to_ids[kept] = -1;
    }
  }
  if (what.log_sum_exp == nullptr) return;
  const auto maximum = [&](int64_t c) { return values(c)[2 * what.k]; };
  const auto sum = [&](int64_t c) { return values(c)[2 * what.k + 1]; };
  float top = -std::numeric_limits<float>::infinity(), total = 0;
  for (int64_t c = 0; c < chunks; c++) top = maximum(c) > top ? maximum(c) : top;
  for (int64_t c = 0; c < chunks; c++)
    if (!(maximum(c) < top) || std::isnan(sum(c)))
      total += sum(c);
    else if (maximum(c) > -std::numeric_limits<float>::infinity())
      total += sum(c) * std::exp(maximum(c) - top);
  what.log_sum_exp[row] =
      top > -std::numeric_limits<float>::infinity() || std::isnan(total) ? top + std::log(total) : top;
}

}  // namespace

const char* rope_problem(int32_t style, int32_t head_size, int32_t rotary) {
  if (style < HL_ROPE_HALVES || style > HL_ROPE_QUARTERS) return "unknown style";
  if (rotary < 0 || rotary > head_size) return "rotary dimensions do not fit the head";
  return rotary % (style == HL_ROPE_QUARTERS ? 4 : 2) == 0
             ? nullptr
             : "rotary dimensions must come in pairs, or in fours for quarters";
}

int64_t top_scratch(int64_t rows, int64_t columns, int32_t k) { return rows * top_chunks(columns) * top_record(k); }

void top_rows(const Team& team, const OpKernels& kernels, const TopRows& what) {
  const int64_t chunks = top_chunks(what.columns);
  const Range mine = team.split(what.rows * chunks);
  for (int64_t i = mine.begin; i < mine.end; i++) {
    const int64_t row = i / chunks, first = i % chunks * top_columns;
    const int64_t n = what.columns - first < top_columns ? what.columns - first : top_columns;
    float* record = reinterpret_cast<float*>(static_cast<char*>(what.parts) + i * top_record(what.k));
    Top top = {record, reinterpret_cast<int32_t*>(record + what.k), 0, 0};
    kernels.top(what.x + row * what.ldx + first, n, static_cast<int32_t>(first), what.k, &top);
    record[2 * what.k] = top.maximum;
    record[2 * what.k + 1] = top.sum;
  }
  team.barrier();
  const Range rows = team.split(what.rows);
  for (int64_t r = rows.begin; r < rows.end; r++) merge_top(what, r);
}

namespace {

// body(row) for all rows, shared out among the context's threads.
template <class Body>
int32_t each_row(hl_ctx* ctx, int64_t rows, const Body& body) {
  return guarded([&]() -> int32_t {
    std::lock_guard<std::mutex> lock(ctx->busy);
    ctx->pool.run([&](const Team& team) {
      const Range mine = team.split(rows);
      for (int64_t r = mine.begin; r < mine.end; r++) body(r);
    });
    return HL_OK;
  });
}

}  // namespace
}  // namespace hl

extern "C" int32_t hl_norm(hl_ctx* ctx, int32_t kind, const float* x, int64_t ldx, int64_t rows, int64_t width,
                           const float* gain, const float* bias, float eps, float* y, int64_t ldy) {
  if (ctx == nullptr || x == nullptr || y == nullptr) return hl::fail(HL_ERR_ARGUMENT, "norm: a null pointer");
  if (kind < HL_NORM_RMS || kind > HL_NORM_LAYER || rows < 0 || width < 1 || ldx < width || ldy < width || !(eps >= 0))
    return hl::fail(HL_ERR_ARGUMENT, "norm: kind %d, %lld rows of %lld, ldx %lld, ldy %lld, eps %g", kind,
                    static_cast<long long>(rows), static_cast<long long>(width), static_cast<long long>(ldx),
                    static_cast<long long>(ldy), static_cast<double>(eps));
  return hl::each_row(ctx, rows,
                      [&](int64_t r) { ctx->isa->ops->norm(kind, x + r * ldx, width, gain, bias, eps, y + r * ldy); });
}

extern "C" int32_t hl_map(hl_ctx* ctx, int32_t function, const float* x, int64_t n, float* y) {
  if (ctx == nullptr || x == nullptr || y == nullptr) return hl::fail(HL_ERR_ARGUMENT, "map: a null pointer");
  if (function < HL_FN_EXP || function > HL_FN_GELU || n < 0)
    return hl::fail(HL_ERR_ARGUMENT, "map: function %d of %lld", function, static_cast<long long>(n));
  return hl::each_row(ctx, 1, [&](int64_t) { ctx->isa->ops->map(function, x, n, y); });
}

extern "C" int32_t hl_gate(hl_ctx* ctx, int32_t function, const float* x, int64_t ldx, int64_t rows, int64_t width,
                           float* y, int64_t ldy) {
  if (ctx == nullptr || x == nullptr || y == nullptr) return hl::fail(HL_ERR_ARGUMENT, "gate: a null pointer");
  if (function < HL_FN_SILU || function > HL_FN_GELU || rows < 0 || width < 1 || ldx < 2 * width || ldy < width)
    return hl::fail(HL_ERR_ARGUMENT, "gate: function %d, %lld rows of %lld, ldx %lld, ldy %lld", function,
                    static_cast<long long>(rows), static_cast<long long>(width), static_cast<long long>(ldx),
                    static_cast<long long>(ldy));
  return hl::each_row(ctx, rows, [&](int64_t r) {
    ctx->isa->ops->gate(function, x + r * ldx, x + r * ldx + width, width, y + r * ldy);
  });
}

extern "C" int32_t hl_rope(hl_ctx* ctx, int32_t style, float* x, int64_t ldx, int64_t tokens, int32_t heads,
                           int32_t head_size, int32_t rotary, const float* cos, const float* sin) {
  if (ctx == nullptr || x == nullptr || cos == nullptr || sin == nullptr)
    return hl::fail(HL_ERR_ARGUMENT, "rope: a null pointer");
  if (const char* problem = hl::rope_problem(style, head_size, rotary))
    return hl::fail(HL_ERR_ARGUMENT, "rope: %s", problem);
  if (tokens < 0 || heads < 1 || ldx < int64_t{heads} * head_size)
    return hl::fail(HL_ERR_ARGUMENT, "rope: rows are too short");
  return hl::each_row(ctx, tokens, [&](int64_t t) {
    for (int32_t h = 0; h < heads; h++)
      ctx->isa->ops->rope(style, x + t * ldx + int64_t{h} * head_size, rotary, cos + t * (rotary / 2),
                          sin + t * (rotary / 2));
  });
}

extern "C" int32_t hl_top(hl_ctx* ctx, const float* x, int64_t ldx, int64_t rows, int64_t columns, int32_t k,
                          float* values, int32_t* ids, float* log_sum_exp) {
  if (ctx == nullptr || x == nullptr || (k > 0 && (values == nullptr || ids == nullptr)))
    return hl::fail(HL_ERR_ARGUMENT, "top: a null pointer");
  if (rows < 0 || columns < 1 || columns > INT32_MAX || ldx < columns || k < 0 || k > columns || k > HL_MOST_TOP)
    return hl::fail(HL_ERR_ARGUMENT, "top: %d of %lld rows of %lld, ldx %lld; at most %d", k,
                    static_cast<long long>(rows), static_cast<long long>(columns), static_cast<long long>(ldx),
                    HL_MOST_TOP);
  return hl::guarded([&]() -> int32_t {
    std::lock_guard<std::mutex> lock(ctx->busy);
    const hl::TopRows what = {
        x, ldx, rows, columns, k, values, ids, log_sum_exp, ctx->scratch.reserve(hl::top_scratch(rows, columns, k))};
    ctx->pool.run([&](const hl::Team& team) { hl::top_rows(team, *ctx->isa->ops, what); });
    return HL_OK;
  });
}
