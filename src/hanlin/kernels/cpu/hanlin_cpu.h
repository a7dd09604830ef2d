/* Hanlin's CPU library: the public C ABI.
 *
 * Every function returns 0 (HL_OK) or a negative hl_status; hl_last_error() then says what was wrong, in the calling
 * thread. No exception crosses this boundary. All arrays are row-major ("C order"), float32 unless said otherwise;
 * strides (ld*) count elements between the starts of two rows. Nothing here keeps a pointer beyond the call, but for
 * hl_program and hl_kv.
 *
 * Promise: row r of a result has the same bits whatever the number of rows, its place among them and the number of
 * threads. Products of the integer kinds have the same bits on every instruction set as well; float kinds (HL_F32,
 * HL_BF16), and everything that takes an exponential, may differ between instruction sets, never within one.
 */
#ifndef HANLIN_CPU_H
#define HANLIN_CPU_H

#include <stdint.h>

#if defined(_WIN32)
#define HL_API __declspec(dllexport)
#else
#define HL_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define HL_ABI_VERSION 1

typedef enum hl_status {
  HL_OK = 0,
  HL_ERR_ARGUMENT = -1, /* a shape, kind, flag or pointer that makes no sense */
  HL_ERR_ISA = -2,      /* an unknown instruction set, or one that this CPU lacks */
  HL_ERR_MEMORY = -3,   /* the system refused memory or a thread */
  HL_ERR_VALUE = -4,    /* NaN or infinity (or a scale beyond float16) among the weights */
  HL_ERR_INTERNAL = -5  /* a bug */
} hl_status;

HL_API int32_t hl_abi_version(void);
HL_API const char* hl_last_error(void); /* of this thread's last failing call; never NULL */

/* ---- instruction sets and threads ---------------------------------------------------------------------------- */

/* Names, best first: "avx512_bf16" (AVX-512 F/BW/DQ/VL + VNNI + BF16), "avx512_vnni", "avx512", "avx2_vnni" (AVX2 + FMA
 * + F16C + AVX-VNNI), "avx2", "neon" (AArch64 with dot product), "portable". Only those compiled for this architecture
 * are listed. */
HL_API int32_t hl_isa_count(void);
HL_API const char* hl_isa_list(int32_t index);     /* NULL beyond the end */
HL_API int32_t hl_isa_supported(const char* name); /* 1 when this CPU can run it */

typedef struct hl_ctx hl_ctx; /* a thread pool and an instruction set; any number of them may live together */

/* threads: >= 1, the caller counts as one. isa: a name from above, or NULL for the best. A context may be used from
 * several threads; calls then wait for one another. It survives fork(): the child starts threads of its own at its
 * first call. */
HL_API int32_t hl_open(int32_t threads, const char* isa, hl_ctx** ctx);
HL_API void hl_close(hl_ctx* ctx);
HL_API const char* hl_isa_name(const hl_ctx* ctx);
HL_API int32_t hl_threads(const hl_ctx* ctx);

/* ---- memory -------------------------------------------------------------------------------------------------- */

/* Zeroed, aligned to 2 MiB (64 bytes below 1 MiB), in transparent huge pages where the system grants them. */
HL_API int32_t hl_alloc(int64_t bytes, void** memory);
HL_API void hl_free(void* memory, int64_t bytes);

/* ---- packed weights ------------------------------------------------------------------------------------------ */

/* A weight (out, in) multiplies x (rows, in) to y (rows, out) = x @ w.T. Outputs are stored in tiles of 32 (HL_TILE),
 * the last one filled up with zeros; one layout a kind, the same for one row and for many, and for every instruction
 * set. Inputs are multiplied in order. "sub" = 32 consecutive inputs, "quad" = 4; o = output within the tile,
 * h = o / 16, l = o % 16.
 *
 *   HL_F32        [tile][in][32] float
 *   HL_BF16       [tile][in/2][h 2][l 16][2] bfloat16; `in` is filled up to even with zeros
 *   HL_INT8_ROW   [tile]{ float scale[32]; [sub]INT8 }                         w = scale * q; `in` is filled up to 32
 *   HL_INT8       [tile][group]{ half scale[32]; [sub]INT8 }                   w = scale * q
 *   HL_INT4       [tile][group]{ half scale[32]; [sub]INT4 }                   w = scale * (q - 8)
 *   HL_INT4_MIN   [tile][group]{ half scale[32]; half min[32]; [sub]INT4 }     w = scale * q + min
 *   HL_INT4_ZERO  [tile][group]{ half scale[32]; half zero[32]; [sub]INT4 }    w = scale * (q - zero)
 *   INT8 = [quad 8][h 2][l 16][4] uint8, each q + 128
 *   INT4 = [pair 4][h 2][l 16][4] bytes, each two codes q in 0..15
 *
 * Byte j of a pair holds input 8 * pair + j in its low nibble and input 8 * pair + 4 + j in its high nibble. Grouped
 * kinds take groups of 32, 64 or 128 inputs, and `in` must be a multiple of the group. Every part starts on a multiple
 * of 64 bytes. */
typedef enum hl_kind {
  HL_F32 = 0,
  HL_BF16 = 1,
  HL_INT8_ROW = 2,
  HL_INT8 = 3,
  HL_INT4 = 4,
  HL_INT4_MIN = 5,
  HL_INT4_ZERO = 6
} hl_kind;

#define HL_TILE 32

typedef struct hl_weight {
  int32_t kind;  /* hl_kind */
  int32_t group; /* 32, 64 or 128; 0 for HL_F32, HL_BF16, HL_INT8_ROW */
  int64_t out, in;
  void* data; /* hl_packed_bytes() bytes, aligned to 64; zeros are a valid weight of zeros */
} hl_weight;

/* Bytes of a packed weight, or a negative hl_status. */
HL_API int64_t hl_packed_bytes(int32_t kind, int64_t out, int64_t in, int32_t group);

/* What a source holds. Rows are `in` values long and follow one another (GGUF blocks: in/32 blocks a row). */
typedef enum hl_source {
  HL_SRC_F32 = 0,
  HL_SRC_F16 = 1,
  HL_SRC_BF16 = 2,
  HL_SRC_Q4_0 = 3, /* GGUF blocks, lossless: into HL_INT4 group 32 */
  HL_SRC_Q4_1 = 4, /* into HL_INT4_MIN group 32 */
  HL_SRC_Q8_0 = 5  /* into HL_INT8 group 32 */
} hl_source;

/* Put `rows` rows of a source into a weight, quantising by rounding to nearest where the kind asks for it.
 *
 * place[i] is the output that source row i becomes (NULL: first, first+1, ...), so several matrices can share one
 * weight (q, k, v), and a gate and an up projection can be interleaved for HL_SILU_MUL: within a tile, outputs 0..15
 * are gates and 16..31 their ups. Symmetric kinds take scale = absmax / 127 (int8) or the value of largest magnitude /
 * -8 (int4, as Q4_0 does); HL_INT4_MIN takes (max - min) / 15 and min; HL_INT4_ZERO rounds the zero point to a whole
 * number in 0..15. HL_ERR_VALUE when a source value is not finite, or a scale does not fit float16; `bad_row` (may be
 * NULL) is then the source row. */
HL_API int32_t hl_pack(hl_ctx* ctx, hl_weight* weight, int32_t source, const void* src, int64_t rows, int64_t first,
                       const int32_t* place, int64_t* bad_row);

/* The same from codes that another quantiser made (AWQ, GPTQ, ChatGLM): codes (rows, in) uint8, 0..15 for int4 and q +
 * 128 for int8; scales (rows, in/group) float16, or (rows,) float32 for HL_INT8_ROW; zeros (rows, in/group) float16,
 * the zero point (HL_INT4_ZERO), the minimum (HL_INT4_MIN) or NULL (symmetric kinds). */
HL_API int32_t hl_pack_codes(hl_ctx* ctx, hl_weight* weight, const uint8_t* codes, const void* scales,
                             const uint16_t* zeros, int64_t rows, int64_t first, const int32_t* place,
                             int64_t* bad_row);

/* Rows of a packed weight as float32: y (rows, in), y[i] = weight[index[i]]. Serves tied embeddings, and tests. */
HL_API int32_t hl_unpack(hl_ctx* ctx, const hl_weight* weight, const int32_t* index, int64_t rows, float* y,
                         int64_t ldy);

/* ---- products ------------------------------------------------------------------------------------------------ */

/* What happens to x @ w.T + bias before it is written. At most one of SILU_MUL and GELU. */
enum {
  HL_ADD = 1,      /* y += result */
  HL_SILU_MUL = 2, /* gate and up interleaved (see hl_pack): y (rows, out/2) = silu(gate) * up; out % 32 must be 0 */
  HL_GELU = 4      /* tanh approximation */
};

/* y (rows, out) = x (rows, in) @ weight.T + bias. bias (out,) in the weight's order of outputs, or NULL.
 * Integer kinds round x to int8, symmetric, per row and per 32 inputs (scale = absmax / 127, to nearest even); HL_BF16
 * rounds x to bfloat16. A row with a value that is not finite gives NaN, in that row only. */
HL_API int32_t hl_linear(hl_ctx* ctx, const hl_weight* weight, const float* x, int64_t ldx, int64_t rows, float* y,
                         int64_t ldy, const float* bias, int32_t flags);

/* ---- the key/value pool -------------------------------------------------------------------------------------- */

/* One layer's pool; layouts are documented at ops_attend. int8 and int4 are asymmetric per token and head:
 * scale = (max - min) / 255 or 15, zero = -min / scale, q = floor(x / scale + zero + 0.5). */
typedef enum hl_kv_kind { HL_KV_F32 = 0, HL_KV_BF16 = 1, HL_KV_INT8 = 2, HL_KV_INT4 = 3 } hl_kv_kind;

typedef struct hl_kv {
  int32_t kind;                                 /* hl_kv_kind */
  int32_t blocks, block_size, heads, head_size; /* heads: of keys and values */
  void* data;                                   /* hl_kv_bytes() bytes, aligned to 64 */
} hl_kv;

HL_API int64_t hl_kv_bytes(int32_t kind, int32_t blocks, int32_t block_size, int32_t heads, int32_t head_size);

/* ---- programs ------------------------------------------------------------------------------------------------ */

/* One step's packed tokens; T tokens of S sequences, sequence s owning tokens query_start[s] .. query_start[s+1]. */
typedef struct hl_step {
  int32_t tokens;             /* T */
  int32_t sequences;          /* S */
  int32_t max_blocks;         /* columns of block_table */
  int32_t rows;               /* how many rows of logits are wanted */
  const int32_t* ids;         /* (T,) */
  const float* cos;           /* (T, rotary/2) */
  const float* sin;           /* (T, rotary/2) */
  const int64_t* slots;       /* (T,) where a token's key and value go: block * block_size + offset */
  const int32_t* query_start; /* (S+1,) */
  const int32_t* context;     /* (S,) keys that the sequence has, these tokens included */
  const int32_t* block_table; /* (S, max_blocks) */
  const int32_t* prefix_len;  /* (S,) the first prefix_len keys are visible to all; NULL or 0: causal */
  const int32_t* row_index;   /* (rows,) tokens whose logits are wanted */
  float* logits;              /* (rows, V) */
  float* hidden;              /* (T, D) the last hidden states, or NULL */
} hl_step;

typedef enum hl_op_code {
  HL_OP_EMBED = 0,
  HL_OP_NORM = 1,
  HL_OP_LINEAR = 2,
  HL_OP_ROPE_WRITE = 3,
  HL_OP_ATTEND = 4,
  HL_OP_ACT_MUL = 5,
  HL_OP_ADD = 6,
  HL_OP_HEAD = 7
} hl_op_code;

/* One kernel call. Buffers are numbered; buffer b holds (T, width[b]) floats. */
typedef struct hl_op {
  int32_t code;         /* hl_op_code */
  int32_t in, in2, out; /* buffers, -1: none */
  int32_t weight;       /* place in the program's table of weights, -1: none */
  int32_t layer;        /* which hl_kv, for ROPE_WRITE and ATTEND */
  int32_t flags;        /* HL_ADD, HL_SILU_MUL, ... */
  int32_t heads, kv_heads, head_size, rotary;
  float eps, scale;
  const float* gain; /* NORM */
  const float* bias; /* NORM, LINEAR; NULL: none */
} hl_op;

typedef struct hl_program hl_program;

HL_API int32_t hl_program_create(hl_ctx* ctx, const hl_op* ops, int32_t n_ops, const hl_weight* weights,
                                 int32_t n_weights, const int64_t* widths, int32_t n_buffers, const hl_kv* kv,
                                 int32_t n_layers, hl_program** program);
HL_API void hl_program_free(hl_program* program);
HL_API int32_t hl_program_run(hl_program* program, const hl_step* step);

#ifdef __cplusplus
}
#endif
#endif
