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

#define HL_ABI_VERSION 5

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

/* Names, best first: "amx" (all of the next one, and AMX's tiles of INT8 and BF16, if the system grants them),
 * "avx512_bf16" (AVX-512 F/BW/DQ/VL + VNNI + BF16), "avx512_vnni", "avx512", "avx2_vnni" (AVX2 + FMA + F16C +
 * AVX-VNNI), "avx2", "neon" (AArch64 with dot product), "portable". Only those compiled for this architecture
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

/* Sums, modulo 2^64, of the rows (one a row) and of the columns (added to what is there) of words (rows, columns),
 * reading each word once. */
HL_API int32_t hl_sums(const uint64_t* words, int64_t rows, int64_t columns, uint64_t* row_sums, uint64_t* column_sums);

/* ---- packed weights ------------------------------------------------------------------------------------------ */

/* A weight (out, in) multiplies x (rows, in) to y (rows, out) = x @ w.T. Outputs are stored in tiles of 32 (HL_TILE),
 * the last one filled up with zeros; one layout a kind, the same for one row and for many, and for every instruction
 * set. Inputs are multiplied in order. "sub" = 32 consecutive inputs, "quad" = 4; o = output within the tile,
 * h = o / 16, l = o % 16.
 *
 *   HL_F32        [tile][in][32] float
 *   HL_BF16       [tile][in/2][h 2][l 16][2] bfloat16; `in` is filled up to even with zeros
 *   HL_INT8_ROW   [tile]{ float scale[32]; [sub]INT8 }                         w = scale * q; `in` is filled up to 32
 *   HL_INT8       [tile]{ UNIT [group]{ half scale[32]; [sub]INT8 } }                  w = scale * q
 *   HL_INT4       [tile]{ UNIT [group]{ half scale[32]; [sub]INT4 } }                  w = scale * (q - 8)
 *   HL_INT4_MIN   [tile]{ UNIT [group]{ half scale[32]; half min[32]; [sub]INT4 } }    w = scale * q + min
 *   HL_INT4_ZERO  [tile]{ UNIT [group]{ half scale[32]; half zero[32]; [sub]INT4 } }   w = scale * (q - zero)
 *   UNIT = float unit[32], see hl_linear
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
 * HL_BF16 rounds x to bfloat16. Integer kinds multiply whole numbers of 16 bits and add them up without rounding: a
 * row's inputs x ~ ux * X, with ux = absmax / 32512 (X to nearest even; X % 256 == 128 becomes one more), and an
 * output's weights w ~ unit * W with W = S * q + M. S and M are the group's scale, and what goes with it, to the nearest
 * multiple of the output's unit: of int4 kinds a power of two with |W| <= 32512, so that the largest scales are exact
 * and others off by half a unit (2^-12 of the largest scale, or less) at most; of HL_INT8 the largest scale / 254; of
 * HL_INT8_ROW the scale itself, and W = q. Then y = X . W * (ux * unit). A row with a value that is not finite gives
 * NaN, in that row only. */
HL_API int32_t hl_linear(hl_ctx* ctx, const hl_weight* weight, const float* x, int64_t ldx, int64_t rows, float* y,
                         int64_t ldy, const float* bias, int32_t flags);

/* ---- operations on rows -------------------------------------------------------------------------------------- */

typedef enum hl_norm_kind {
  HL_NORM_RMS = 0,  /* x / sqrt(mean(x^2) + eps) * gain + bias */
  HL_NORM_LAYER = 1 /* the same of x - mean(x) */
} hl_norm_kind;

/* y (rows, width) = norm(x); gain and bias (width,) or NULL. y may be x. In float32 the two roundings that RMSNorms are
 * released with (scale before or after rounding to half precision) are the same number. */
HL_API int32_t hl_norm(hl_ctx* ctx, int32_t kind, const float* x, int64_t ldx, int64_t rows, int64_t width,
                       const float* gain, const float* bias, float eps, float* y, int64_t ldy);

typedef enum hl_function { HL_FN_EXP = 0, HL_FN_SILU = 1, HL_FN_GELU = 2 } hl_function;

/* y (n,) = function(x). exp is within 2 units in the last place of the true value for -87.33 <= x <= 88.37, and clamped
 * to its values at those two outside; silu and gelu (tanh approximation) use it. */
HL_API int32_t hl_map(hl_ctx* ctx, int32_t function, const float* x, int64_t n, float* y);

/* y (rows, width) = function(gate) * up, with x (rows, 2 * width) = gate | up; function: HL_FN_SILU or HL_FN_GELU. */
HL_API int32_t hl_gate(hl_ctx* ctx, int32_t function, const float* x, int64_t ldx, int64_t rows, int64_t width,
                       float* y, int64_t ldy);

typedef enum hl_rope_style {
  HL_ROPE_HALVES = 0,      /* dimension i turns with i + R/2 */
  HL_ROPE_INTERLEAVED = 1, /* 2i with 2i + 1 */
  HL_ROPE_QUARTERS = 2     /* i with i + R/4 within each half of R (ChatGLM-6B: two rows of positions) */
} hl_rope_style;

/* Turn the first R = `rotary` dimensions of every head of x (tokens, heads * head_size) in place; cos and sin
 * (tokens, R/2). Pair p of a token (halves and interleaved: p = i; quarters: p = i, and R/4 + i in the second half)
 * becomes a cos[p] - b sin[p], b cos[p] + a sin[p]. */
HL_API int32_t hl_rope(hl_ctx* ctx, int32_t style, float* x, int64_t ldx, int64_t tokens, int32_t heads,
                       int32_t head_size, int32_t rotary, const float* cos, const float* sin);

#define HL_MOST_TOP 256

/* Of every row of x (rows, columns): the k largest values in falling order with their columns (equal values: lower
 * column first), and log(sum(exp(x))). k in 0..min(columns, HL_MOST_TOP); argmax is k = 1. values and ids (rows, k),
 * log_sum_exp (rows,) or NULL. NaN and -infinity are never chosen: places left over hold -infinity and -1. A row with a
 * NaN has a log_sum_exp of NaN. */
HL_API int32_t hl_top(hl_ctx* ctx, const float* x, int64_t ldx, int64_t rows, int64_t columns, int32_t k,
                      float* values, int32_t* ids, float* log_sum_exp);

/* ---- the key/value pool -------------------------------------------------------------------------------------- */

/* One layer's keys and values, in blocks of `block_size` slots (16, 32, 64: a multiple of HL_SLOTS). A slot, block *
 * block_size + offset, is one token of one sequence.
 *
 * Layout: [block][head][HL_SLOTS slots at a time]{ keys; values; parameters }, each part a multiple of 64 bytes, so a
 * block is contiguous and can be copied and swapped as bytes. P is head_size filled up to a multiple of 32.
 *
 *   HL_KV_F32    keys [P][16 slots]; values [16 slots][P] float
 *   HL_KV_BF16   keys [P/2][16 slots][2]; values [8 pairs of slots][P][2] bfloat16: what a bfloat16 dot product reads
 *   HL_KV_INT8   keys [P/4][16 slots][4]; values [4 quads of slots][P][4] codes: what a byte dot product reads; then
 *                half scale[16], min[16] of the keys, and the same of the values
 *   HL_KV_INT4   as HL_KV_INT8, but of every two vectors of 64 codes of values the first has the low nibbles
 *
 * Keys are of eight bits in HL_KV_INT4 as well: of four, they cost a small model ten times as much as the values do.
 * int8 and int4 are asymmetric per token and head: scale = (max - min) / 255 or 15, rounded up to float16; min rounded
 * to float16; code = floor((x - min) / scale + 0.5); x' = code * scale + min. So |x - x'| <= scale / 2 + |min| / 2048
 * for |x| < 65504. A token with a value that is not finite reads back as NaN in that head. Slots never written hold
 * zeros. */
typedef enum hl_kv_kind { HL_KV_F32 = 0, HL_KV_BF16 = 1, HL_KV_INT8 = 2, HL_KV_INT4 = 3 } hl_kv_kind;

#define HL_SLOTS 16

typedef struct hl_kv {
  int32_t kind;                                 /* hl_kv_kind */
  int32_t blocks, block_size, heads, head_size; /* heads: of keys and values; head_size is even */
  void* data;                                   /* hl_kv_bytes() bytes, aligned to 64, zeroed at first */
} hl_kv;

/* Bytes of a pool, or a negative hl_status. One block: blocks = 1; block b starts b times that behind `data`. */
HL_API int64_t hl_kv_bytes(int32_t kind, int32_t blocks, int32_t block_size, int32_t heads, int32_t head_size);

/* Keys and values (tokens, heads * head_size), rotated already, into slots (tokens,), each at most once. Also how a
 * soft prefix gets in: it takes the first slots of a sequence, and counts in `context` and `prefix_len`. */
HL_API int32_t hl_kv_write(hl_ctx* ctx, const hl_kv* kv, const int64_t* slots, int64_t tokens, const float* k,
                           int64_t ldk, const float* v, int64_t ldv);

/* Back again, dequantised. */
HL_API int32_t hl_kv_read(hl_ctx* ctx, const hl_kv* kv, const int64_t* slots, int64_t tokens, float* k, int64_t ldk,
                          float* v, int64_t ldv);

/* Block from[i] of `source` over block to[i] of `target`, i < n; the two pools differ in `blocks` and `data` alone, and
 * may be one. No block of `to` may be in `from`. */
HL_API int32_t hl_kv_copy(hl_ctx* ctx, const hl_kv* target, const int32_t* to, const hl_kv* source,
                          const int32_t* from, int64_t n);

/* ---- steps --------------------------------------------------------------------------------------------------- */

/* One step's packed tokens: T tokens of S sequences, sequence s owning tokens query_start[s] .. query_start[s+1], which
 * are the last of its context[s] tokens; its slot number i is in block block_table[s][i / block_size]. One token is a
 * decode, many are a prompt or a part of one. Everything is checked before anything is computed. */
typedef struct hl_step {
  int32_t tokens;             /* T */
  int32_t sequences;          /* S */
  int32_t max_blocks;         /* columns of block_table */
  int32_t rows;               /* R: how many tokens are wanted at the end; 0 for none */
  int32_t top;                /* how many of the largest logits are wanted, see hl_top */
  int32_t states;             /* N: the last so many of the R wanted tokens are wanted in `hidden` alone */
  const int32_t* ids;         /* (T,) */
  const float* cos;           /* (T, rotary/2) */
  const float* sin;           /* (T, rotary/2) */
  const int64_t* slots;       /* (T,) where a token's key and value go: block * block_size + offset */
  const int32_t* query_start; /* (S+1,) */
  const int32_t* context;     /* (S,) tokens that the sequence has, these included */
  const int32_t* block_table; /* (S, max_blocks) */
  const int32_t* prefix_len;  /* (S,) the first prefix_len tokens see each other both ways; NULL or 0: causal */
  const int32_t* row_index;   /* (R,) the wanted tokens, each at most once */
  float* logits;              /* (R - N, V) */
  float* hidden;              /* (R, D) what the head multiplies; may be NULL when N is 0 */
  float* top_values;          /* (R - N, top), or NULL when top is 0 */
  int32_t* top_ids;           /* (R - N, top), or NULL when top is 0 */
  float* log_sum_exp;         /* (R - N,) of the logits, or NULL */
  const struct hl_adapter* const* adapters; /* (S,) what each sequence's tokens add, or NULL; see hl_adapter */
  const float* embeddings;       /* (E, D) rows that stand in for embeddings of ids, or NULL */
  const int32_t* embedding_rows; /* (T,) which of them stands in for a token's; -1: none. NULL when E is 0 */
  int32_t n_embeddings;          /* E */
} hl_step;

/* out (T, heads * head_size) = softmax(scale * q k^T) v over the pool, whose slots hold the step's own keys and values
 * already. Reads tokens, sequences, max_blocks, query_start, context, block_table and prefix_len of a step. Query head
 * h reads kv head h / (heads / kv->heads).
 *
 * Arithmetic, and its largest relative error (root mean square, against float64 on the stored keys and values):
 * HL_KV_F32 is float32 (1e-6). HL_KV_BF16 rounds q and the weights of the softmax to bfloat16 and adds up in float32
 * where the CPU multiplies bfloat16 (4e-3); elsewhere it is float32. HL_KV_INT8 and HL_KV_INT4 round q to 15 bits with
 * a scale a row, and weights times the scales of their tokens to 14 bits with a scale a span; their products with
 * codes are exact sums (1e-3).
 *
 * Keys are taken HL_SPAN at a time from the sequence's first on; each span has a softmax of its own, and spans are
 * merged in order: so the bits depend neither on chunks nor on threads. (But for a sequence with NaN or infinity among
 * its own values: a token with one may spoil earlier tokens of the same sequence that are computed in the same step.
 * Other sequences it never reaches.) */
#define HL_SPAN 256
HL_API int32_t hl_attend(hl_ctx* ctx, const hl_kv* kv, const hl_step* step, int32_t heads, float scale, const float* q,
                         int64_t ldq, float* out, int64_t ldo);

/* ---- programs ------------------------------------------------------------------------------------------------ */

/* A whole model as a flat list of operations over numbered buffers. Buffer b holds `widths[b]` floats for every token;
 * those that a GATHER makes, and what is computed from them, hold one row for every wanted token instead. */
typedef enum hl_op_code {
  HL_OP_EMBED = 0,  /* out = rows ids of `weight`, or of `table` where weight is -1; or the step's `embeddings` */
  HL_OP_NORM = 1,   /* out = norm(in), `style` hl_norm_kind, with gain, bias, eps */
  HL_OP_LINEAR = 2, /* out = in @ weight.T + bias, `flags` HL_ADD, HL_SILU_MUL, HL_GELU */
  HL_OP_ROPE = 3,   /* in = q | k | v (heads, kv_heads, kv_heads times head_size): turn q in place and k, `style`
                       hl_rope_style, with `rotary` dimensions (0: none); write k and v into pool `layer` */
  HL_OP_ATTEND = 4, /* out = attention of the q at the front of `in` over pool `layer`, with `scale` */
  HL_OP_GATE = 5,   /* out = function(gate) * up, in = gate | up, `style` hl_function */
  HL_OP_ADD = 6,    /* out = scale * in + in2, or scale * in where in2 is -1; out may be in or in2 */
  HL_OP_GATHER = 7, /* out = the wanted rows of in */
  HL_OP_HEAD = 8    /* the step's logits = in @ weight.T + bias; hidden = in; top. Once, at the end, after a GATHER */
} hl_op_code;

typedef struct hl_op {
  int32_t code;         /* hl_op_code */
  int32_t in, in2, out; /* buffers, -1: none */
  int32_t weight;       /* place in the program's table of weights, -1: none */
  int32_t layer;        /* which hl_kv: ROPE, ATTEND */
  int32_t flags, style;
  int32_t heads, kv_heads, head_size, rotary;
  int32_t table_kind;   /* HL_SRC_F32, HL_SRC_F16 or HL_SRC_BF16 */
  int32_t table_rows;
  float eps, scale;
  const float* gain;    /* (width,) NORM; NULL: ones */
  const float* bias;    /* (width,) NORM, LINEAR, HEAD; NULL: zeros */
  const void* table;    /* (table_rows, width) EMBED */
} hl_op;

typedef struct hl_program hl_program;

/* Check everything and reserve buffers for steps of up to `max_tokens` tokens. What the operations, weights and pools
 * point to is not copied and must outlive the program, as must the context. */
HL_API int32_t hl_program_create(hl_ctx* ctx, const hl_op* ops, int32_t n_ops, const hl_weight* weights,
                                 int32_t n_weights, const int64_t* widths, int32_t n_buffers, const hl_kv* pools,
                                 int32_t n_layers, int32_t max_tokens, hl_program** program);
HL_API void hl_program_free(hl_program* program);

/* A low-rank addition to one LINEAR or HEAD: in @ weight.T + (in @ down.T) @ up, before bias and flags. Of every 16
 * outputs in the weight's order, `up` holds only the `taken` inner dimensions that they take: [16 outputs][taken][16],
 * filled up to whole tiles of HL_TILE outputs. */
typedef struct hl_low_rank {
  int32_t rank;         /* inner dimensions; 0: adds nothing, and the rest is not looked at */
  int32_t taken;        /* 1..rank */
  const void* down;     /* (rank, in) */
  const void* up;
  const int32_t* first; /* the first inner dimension that each 16 outputs take; -1: none */
} hl_low_rank;

/* Additions to all operations of a program. Made once, used by any number of steps, as long as they run. */
typedef struct hl_adapter {
  int32_t n_ops;
  int32_t widest;         /* the largest rank */
  int32_t bf16;           /* 1: down and up hold bfloat16, 0: float */
  const hl_low_rank* ops; /* (n_ops,) */
} hl_adapter;

/* HL_OK, or what of an adapter does not fit the program. To be asked once; steps do not look again. */
HL_API int32_t hl_adapter_check(const hl_program* program, const hl_adapter* adapter);

/* Bytes of its buffers. They are not touched before a step needs them. */
HL_API int64_t hl_program_bytes(const hl_program* program);

/* One step, on all threads of the context. A step of more than max_tokens tokens is refused. */
HL_API int32_t hl_program_run(hl_program* program, const hl_step* step);

/* Seconds that every operation took since the last call, summed over steps: seconds (n_ops,). The first call starts the
 * clock; NULL stops it. */
HL_API int32_t hl_program_profile(hl_program* program, double* seconds);

#ifdef __cplusplus
}
#endif
#endif
