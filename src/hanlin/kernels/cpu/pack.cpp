// From the matrices that files hold to packed weights, a row at a time: read or quantise a row into codes, then put it
// in its place.
#include <atomic>
#include <cmath>
#include <cstring>
#include <vector>

#include "context.h"
#include "half.h"
#include "linear.h"

namespace hl {
namespace {

constexpr int block = 32;  // values in a GGUF block
constexpr int64_t q4_0_bytes = 18, q4_1_bytes = 20, q8_0_bytes = 34;

// One row on its way: `codes` for integer kinds, `values` for float kinds and before quantising.
struct Row {
  explicit Row(const hl_weight& w)
      : values(static_cast<size_t>(w.in)),
        codes(static_cast<size_t>((w.in + 31) / 32 * 32)),
        scales(static_cast<size_t>(is_grouped(w.kind) ? w.in / w.group : 0)),
        zeros(scales.size()) {}

  std::vector<float> values;
  std::vector<uint8_t> codes;           // int8: q + 128; int4: 0..15
  std::vector<uint16_t> scales, zeros;  // float16, one a group
  float scale = 0;                      // HL_INT8_ROW
};

// ---- reading a row: false when a value is not finite ----------------------------------------------------------------

bool read_values(const hl_weight& w, int32_t source, const void* src, int64_t row, Row& out) {
  const size_t n = static_cast<size_t>(w.in), start = static_cast<size_t>(row) * n;
  float* to = out.values.data();
  if (source == HL_SRC_F32) {
    std::memcpy(to, static_cast<const float*>(src) + start, n * sizeof(float));
  } else {
    const uint16_t* from = static_cast<const uint16_t*>(src) + start;
    if (source == HL_SRC_BF16)
      for (size_t i = 0; i < n; i++) to[i] = bf16_to_float(from[i]);
    else
      for (size_t i = 0; i < n; i++) to[i] = half_to_float(from[i]);
  }
  uint32_t largest = 0;
  for (size_t i = 0; i < n; i++) {
    const uint32_t magnitude = float_to_bits(to[i]) & 0x7FFFFFFFu;
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest < 0x7F800000u;
}

bool finite_half(uint16_t h) { return (h & 0x7C00u) != 0x7C00u; }

uint16_t read16(const uint8_t* p) {
  uint16_t u;
  std::memcpy(&u, p, 2);
  return u;
}

bool read_blocks(const hl_weight& w, int32_t source, const void* src, int64_t row, Row& out) {
  const int64_t blocks = w.in / block, bytes = source == HL_SRC_Q4_0   ? q4_0_bytes
                                               : source == HL_SRC_Q4_1 ? q4_1_bytes
                                                                       : q8_0_bytes;
  const uint8_t* p = static_cast<const uint8_t*>(src) + row * blocks * bytes;
  bool finite = true;
  for (int64_t b = 0; b < blocks; b++, p += bytes) {
    const size_t g = static_cast<size_t>(b);
    uint8_t* codes = out.codes.data() + b * block;
    out.scales[g] = read16(p);
    finite &= finite_half(out.scales[g]);
    if (source == HL_SRC_Q8_0) {
      for (int i = 0; i < block; i++) codes[i] = p[2 + i] ^ 0x80;
      continue;
    }
    const uint8_t* nibbles = p + 2;
    if (source == HL_SRC_Q4_1) {
      out.zeros[g] = read16(nibbles);
      finite &= finite_half(out.zeros[g]);
      nibbles += 2;
    }
    for (int i = 0; i < block / 2; i++) {
      codes[i] = nibbles[i] & 15;
      codes[i + block / 2] = nibbles[i] >> 4;
    }
  }
  return finite;
}

struct Codes {
  const uint8_t* codes;
  const void* scales;
  const uint16_t* zeros;
};

bool read_codes(const hl_weight& w, const Codes& from, int64_t row, Row& out) {
  const size_t n = static_cast<size_t>(w.in), groups = out.scales.size(), r = static_cast<size_t>(row);
  std::memcpy(out.codes.data(), from.codes + r * n, n);
  if (is_int4(w.kind)) {
    uint8_t all = 0;
    for (size_t i = 0; i < n; i++) all |= out.codes[i];
    if (all > 15) return false;
  }
  if (w.kind == HL_INT8_ROW) {
    out.scale = static_cast<const float*>(from.scales)[r];
    return std::isfinite(out.scale);
  }
  bool finite = true;
  for (size_t g = 0; g < groups; g++) {
    out.scales[g] = static_cast<const uint16_t*>(from.scales)[r * groups + g];
    if (has_offsets(w.kind)) out.zeros[g] = from.zeros[r * groups + g];
    finite &= finite_half(out.scales[g]) && finite_half(out.zeros[g]);
  }
  return finite;
}

// ---- quantising -----------------------------------------------------------------------------------------------------

// To the nearest whole number, ties to even, for |x| < 2^22; unlike rintf it is inlined, and turned into vectors, on
// every CPU.
inline float nearest(float x) { return (x + 12582912.0f) - 12582912.0f; }
inline float clamp(float x, float low, float high) { return x < low ? low : x > high ? high : x; }

// A scale as float16: never 0 unless it is, so that no group vanishes.
uint16_t half_scale(float scale) {
  const uint16_t h = float_to_half(scale);
  return h == 0 && scale > 0 ? 1 : h == 0x8000u && scale < 0 ? 0x8001u : h;
}

float inverse_of(float scale) { return scale == 0 ? 0 : 1 / scale; }

// codes[i] = round(x[i] / scale) + middle, kept within 0..top.
void round_codes(const float* x, int64_t n, float scale, float middle, float top, uint8_t* codes) {
  const float inverse = inverse_of(scale);
  for (int64_t i = 0; i < n; i++)
    codes[i] =
        static_cast<uint8_t>(static_cast<int32_t>(clamp(nearest(clamp(x[i] * inverse, -256, 256)) + middle, 0, top)));
}

struct Extent {
  float low, high;  // of the values and 0
};

Extent extent_of(const float* x, int64_t n) {
  float low = 0, high = 0;
  for (int64_t i = 0; i < n; i++) {
    low = x[i] < low ? x[i] : low;
    high = x[i] > high ? x[i] : high;
  }
  return {low, high};
}

bool quantise(const hl_weight& w, Row& row) {
  if (w.kind == HL_INT8_ROW) {
    const Extent e = extent_of(row.values.data(), w.in);
    row.scale = std::fmax(-e.low, e.high) / 127;
    if (row.scale < 1e-30f) row.scale = 0;  // its inverse would overflow
    round_codes(row.values.data(), w.in, row.scale, 128, 255, row.codes.data());
    return true;
  }
  bool fits = true;
  for (size_t g = 0; g < row.scales.size(); g++) {
    const float* x = row.values.data() + g * static_cast<size_t>(w.group);
    uint8_t* codes = row.codes.data() + g * static_cast<size_t>(w.group);
    Extent e = extent_of(x, w.group);
    float scale, middle = 0;
    if (w.kind == HL_INT8) {
      scale = std::fmax(-e.low, e.high) / 127;
      middle = 128;
    } else if (w.kind == HL_INT4) {
      scale = -e.low >= e.high ? e.low / -8 : e.high / -8;  // the value of largest magnitude becomes code 0
      middle = 8;
    } else {
      scale = (e.high - e.low) / 15;
    }
    if (!std::isfinite(scale)) return false;
    row.scales[g] = half_scale(scale);
    scale = half_to_float(row.scales[g]);
    if (w.kind == HL_INT4_ZERO) {
      middle = clamp(nearest(-e.low * inverse_of(scale)), 0, 15);
      row.zeros[g] = float_to_half(middle);
    }
    if (w.kind == HL_INT4_MIN) {
      row.zeros[g] = float_to_half(e.low);
      fits &= finite_half(row.zeros[g]);
      const float low = half_to_float(row.zeros[g]), inverse = inverse_of(scale);
      for (int64_t i = 0; i < w.group; i++)
        codes[i] =
            static_cast<uint8_t>(static_cast<int32_t>(clamp(nearest(clamp((x[i] - low) * inverse, -256, 256)), 0, 15)));
    } else {
      round_codes(x, w.group, scale, middle, w.kind == HL_INT8 ? 255 : 15, codes);
    }
    fits &= finite_half(row.scales[g]);
  }
  return fits;
}

// ---- placing --------------------------------------------------------------------------------------------------------

// Calls visit(input, byte offset from the tile's start) for the first byte of each quad (int8) or pair (int4) of output
// `out`.
template <class Visit>
void each_quad(const hl_weight& w, int64_t out, const Visit& visit) {
  const int64_t in = (w.in + 31) / 32 * 32, group = is_grouped(w.kind) ? w.group : in;
  const int64_t step = is_int4(w.kind) ? 8 : 4, lane = out % HL_TILE * 4;
  int64_t at = units_bytes;
  for (int64_t k = 0; k < in;) {
    if (is_grouped(w.kind)) at += group_header(w.kind);
    for (const int64_t end = k + group; k < end; k += step, at += HL_TILE * 4) visit(k, at + lane);
  }
}

uint8_t* tile_of(const hl_weight& w, int64_t out) {
  return static_cast<uint8_t*>(w.data) + out / HL_TILE * tile_bytes(w);
}

// What the whole numbers of a row are multiples of, see hl_linear.
float unit_for(int32_t kind, const Row& row) {
  float scale = 0, most = 0;
  for (size_t g = 0; g < row.scales.size(); g++) {
    const float d = half_to_float(row.scales[g]);
    scale = std::fmax(scale, std::fabs(d));
    if (!has_offsets(kind)) continue;
    const float z = half_to_float(row.zeros[g]), low = kind == HL_INT4_MIN ? z : -d * z;
    most = std::fmax(most, std::fmax(std::fabs(low), std::fabs(low + 15 * d)));
  }
  if (scale == 0 && most == 0) return 1;
  if (kind == HL_INT8) return scale / 254;
  most = std::fmax(most, 8 * scale);
  int exponent;
  std::frexp(most / 32504, &exponent);  // rounding S and M may add 8
  return std::ldexp(1.0f, exponent);
}

void put(const hl_weight& w, const Row& row, int64_t out) {
  uint8_t* tile = tile_of(w, out);
  const int64_t lane = out % HL_TILE;
  if (w.kind == HL_F32) {
    float* to = reinterpret_cast<float*>(tile) + lane;
    for (int64_t k = 0; k < w.in; k++) to[k * HL_TILE] = row.values[static_cast<size_t>(k)];
    return;
  }
  if (w.kind == HL_BF16) {
    uint16_t* to = reinterpret_cast<uint16_t*>(tile) + 2 * lane;
    for (int64_t k = 0; k < w.in; k++)
      to[k / 2 * 2 * HL_TILE + k % 2] = float_to_bf16(row.values[static_cast<size_t>(k)]);
    return;
  }
  const uint8_t* codes = row.codes.data();
  if (is_int4(w.kind)) {
    each_quad(w, out, [&](int64_t k, int64_t at) {
      for (int j = 0; j < 4; j++) tile[at + j] = static_cast<uint8_t>(codes[k + j] | codes[k + 4 + j] << 4);
    });
  } else {
    each_quad(w, out, [&](int64_t k, int64_t at) { std::memcpy(tile + at, codes + k, 4); });
  }
  const float unit = w.kind == HL_INT8_ROW ? row.scale : unit_for(w.kind, row);
  std::memcpy(tile + 4 * lane, &unit, 4);
  for (size_t g = 0; g < row.scales.size(); g++) {
    uint8_t* header = tile + units_bytes + static_cast<int64_t>(g) * group_bytes(w.kind, w.group) + 2 * lane;
    std::memcpy(header, &row.scales[g], 2);
    if (has_offsets(w.kind)) std::memcpy(header + 2 * HL_TILE, &row.zeros[g], 2);
  }
}

}  // namespace

void unpack_row(const hl_weight& w, int64_t out, float* x) {
  const uint8_t* tile = tile_of(w, out);
  const int64_t lane = out % HL_TILE;
  if (w.kind == HL_F32) {
    for (int64_t k = 0; k < w.in; k++) x[k] = reinterpret_cast<const float*>(tile)[k * HL_TILE + lane];
    return;
  }
  if (w.kind == HL_BF16) {
    const uint16_t* from = reinterpret_cast<const uint16_t*>(tile) + 2 * lane;
    for (int64_t k = 0; k < w.in; k++) x[k] = bf16_to_float(from[k / 2 * 2 * HL_TILE + k % 2]);
    return;
  }
  const int64_t bytes = is_grouped(w.kind) ? group_bytes(w.kind, w.group) : 0;
  float scale = 0, offset = 0;
  if (w.kind == HL_INT8_ROW) std::memcpy(&scale, tile + 4 * lane, 4);
  each_quad(w, out, [&](int64_t k, int64_t at) {
    if (is_grouped(w.kind) && k % w.group == 0) {
      const uint8_t* header = tile + units_bytes + k / w.group * bytes + 2 * lane;
      scale = half_to_float(read16(header));
      if (has_offsets(w.kind)) offset = half_to_float(read16(header + 2 * HL_TILE));
    }
    for (int64_t j = 0; j < (is_int4(w.kind) ? 8 : 4) && k + j < w.in; j++) {
      if (!is_int4(w.kind)) {
        x[k + j] = scale * static_cast<float>(tile[at + j] - 128);
        continue;
      }
      const int code = j < 4 ? tile[at + j] & 15 : tile[at + j - 4] >> 4;
      x[k + j] = w.kind == HL_INT4       ? scale * static_cast<float>(code - 8)
                 : w.kind == HL_INT4_MIN ? scale * static_cast<float>(code) + offset
                                         : scale * (static_cast<float>(code) - offset);
    }
  });
}

namespace {

// ---- what both ways of packing share --------------------------------------------------------------------------------

int32_t check(const char* call, const hl_ctx* ctx, const hl_weight* w, const void* src, int64_t rows, int64_t first,
              const int32_t* place) {
  if (ctx == nullptr || w == nullptr || w->data == nullptr || src == nullptr)
    return fail(HL_ERR_ARGUMENT, "%s: a null pointer", call);
  if (const char* problem = weight_problem(*w)) return fail(HL_ERR_ARGUMENT, "%s: weight: %s", call, problem);
  if (rows < 0 || (place == nullptr && (first < 0 || rows > w->out - first)))
    return fail(HL_ERR_ARGUMENT, "%s: %lld rows at %lld do not fit %lld outputs", call, static_cast<long long>(rows),
                static_cast<long long>(first), static_cast<long long>(w->out));
  for (int64_t r = 0; place != nullptr && r < rows; r++)
    if (place[r] < 0 || place[r] >= w->out)
      return fail(HL_ERR_ARGUMENT, "%s: place[%lld] = %d is not one of %lld outputs", call, static_cast<long long>(r),
                  place[r], static_cast<long long>(w->out));
  return HL_OK;
}

// read(row number, Row&) -> finite. Threads take whole tiles where rows keep their order.
template <class Read>
int32_t pack_rows(hl_ctx* ctx, const hl_weight& w, int64_t rows, int64_t first, const int32_t* place, int64_t* bad_row,
                  const Read& read) {
  return guarded([&]() -> int32_t {
    std::lock_guard<std::mutex> lock(ctx->busy);
    std::vector<Row> scratch(static_cast<size_t>(ctx->pool.size()), Row(w));
    std::atomic<int64_t> bad{rows};
    ctx->pool.run([&](const Team& team) {
      Row& row = scratch[static_cast<size_t>(team.rank)];
      const Range mine = team.split(rows, HL_TILE);
      for (int64_t r = mine.begin; r < mine.end; r++) {
        if (read(r, row)) {
          put(w, row, place != nullptr ? place[r] : first + r);
          continue;
        }
        int64_t seen = bad.load();
        while (r < seen && !bad.compare_exchange_weak(seen, r)) {
        }
        return;
      }
    });
    if (bad.load() == rows) return HL_OK;
    if (bad_row != nullptr) *bad_row = bad.load();
    return fail(HL_ERR_VALUE, "row %lld holds a NaN, an infinity, a scale beyond float16 or a code beyond its bits",
                static_cast<long long>(bad.load()));
  });
}

}  // namespace
}  // namespace hl

extern "C" int32_t hl_pack(hl_ctx* ctx, hl_weight* weight, int32_t source, const void* src, int64_t rows, int64_t first,
                           const int32_t* place, int64_t* bad_row) {
  if (const int32_t status = hl::check("pack", ctx, weight, src, rows, first, place)) return status;
  const hl_weight& w = *weight;
  if (source < HL_SRC_F32 || source > HL_SRC_Q8_0) return hl::fail(HL_ERR_ARGUMENT, "pack: unknown source %d", source);
  const bool blocks = source >= HL_SRC_Q4_0;
  const int32_t kind = source == HL_SRC_Q4_0 ? HL_INT4 : source == HL_SRC_Q4_1 ? HL_INT4_MIN : HL_INT8;
  if (blocks && (w.kind != kind || w.group != hl::block))
    return hl::fail(HL_ERR_ARGUMENT,
                    "pack: these GGUF blocks fit kind %d with groups of 32 only, not kind %d with groups of %d", kind,
                    w.kind, w.group);
  return hl::pack_rows(ctx, w, rows, first, place, bad_row, [&](int64_t r, hl::Row& row) {
    if (blocks) return hl::read_blocks(w, source, src, r, row);
    if (!hl::read_values(w, source, src, r, row)) return false;
    return w.kind == HL_F32 || w.kind == HL_BF16 || hl::quantise(w, row);
  });
}

extern "C" int32_t hl_pack_codes(hl_ctx* ctx, hl_weight* weight, const uint8_t* codes, const void* scales,
                                 const uint16_t* zeros, int64_t rows, int64_t first, const int32_t* place,
                                 int64_t* bad_row) {
  if (const int32_t status = hl::check("pack_codes", ctx, weight, codes, rows, first, place)) return status;
  const hl_weight& w = *weight;
  if (w.kind < HL_INT8_ROW) return hl::fail(HL_ERR_ARGUMENT, "pack_codes: a float kind has no codes");
  if (scales == nullptr || (zeros != nullptr) != hl::has_offsets(w.kind))
    return hl::fail(HL_ERR_ARGUMENT, "pack_codes: kind %d needs scales and %s zeros", w.kind,
                    hl::has_offsets(w.kind) ? "" : "no");
  const hl::Codes from = {codes, scales, zeros};
  return hl::pack_rows(ctx, w, rows, first, place, bad_row,
                       [&](int64_t r, hl::Row& row) { return hl::read_codes(w, from, r, row); });
}

extern "C" int32_t hl_unpack(hl_ctx* ctx, const hl_weight* weight, const int32_t* index, int64_t rows, float* y,
                             int64_t ldy) {
  if (const int32_t status = hl::check("unpack", ctx, weight, index, rows, 0, index)) return status;
  if (y == nullptr || ldy < weight->in) return hl::fail(HL_ERR_ARGUMENT, "unpack: no room for a row");
  return hl::guarded([&]() -> int32_t {
    std::lock_guard<std::mutex> lock(ctx->busy);
    ctx->pool.run([&](const hl::Team& team) {
      const hl::Range mine = team.split(rows);
      for (int64_t r = mine.begin; r < mine.end; r++) hl::unpack_row(*weight, index[r], y + r * ldy);
    });
    return HL_OK;
  });
}
