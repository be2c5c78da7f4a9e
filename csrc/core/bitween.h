/* bitween core: the whole interface, and its manual.
 *
 * Plain C11 without Python. Rules that hold for every function:
 *   - arguments are checked before memory is touched, and then nothing is written; a failure found later, in
 *     the values themselves (BW_ERR_NONFINITE, _RANGE, _CODE, _SCALE, _IMPORTANCE), or an interrupt, leaves outputs
 *     partly written;
 *   - the result is a bw_status: BW_OK (0) or a negative BW_ERR_*; nothing prints, exits or aborts;
 *   - no global mutable state besides the thread pool, the instruction set and the interrupt chosen at start;
 *     functions may be called from several threads at once (on different outputs);
 *   - results do not depend on the number of threads.
 *
 * Words: a *scheme* says how a matrix (rows, cols) is stored: number of code values (`levels`),
 * columns per group (`group_size`, -1 = the whole row; the last group may be shorter), symmetric or not.
 * A weight is (q - zero) * scale with 0 <= q < levels. `scale` is the step between levels, fp16, > 0.
 * symmetric: zero = levels / 2 (0.5 for two levels, 1 for three). asymmetric: one integer zero a group.
 *
 * Saved layout, which is the layout in memory too (see docs/format.md):
 *   codes  uint8 (rows, row_bytes)       dense, least significant bit first; three levels: 5 codes a byte
 *   scales fp16  (rows, n_groups)
 *   zeros  uint8 (rows, zero_bytes)      dense, least significant bit first; NULL when symmetric
 */
#ifndef BITWEEN_H
#define BITWEEN_H

#include <stddef.h>
#include <stdint.h>

typedef enum {
    BW_OK = 0,
    BW_ERR_ARGUMENT = -1,    /* a value outside its range */
    BW_ERR_SHAPE = -2,       /* shapes that do not fit together */
    BW_ERR_OVERFLOW = -3,    /* a size that does not fit in memory's address range */
    BW_ERR_NONFINITE = -4,   /* NaN or infinity in an input */
    BW_ERR_RANGE = -5,       /* a group's range needs a scale beyond fp16 (65504) */
    BW_ERR_MEMORY = -6,      /* allocation failed */
    BW_ERR_FACTOR = -7,      /* a factorisation failed although damped */
    BW_ERR_CODE = -8,        /* packed data holds a value outside the scheme */
    BW_ERR_INDEX = -9,       /* an index outside its range */
    BW_ERR_IMPORTANCE = -10, /* an importance that is negative, NaN or infinite */
    BW_ERR_HESSIAN = -11,    /* a Hessian that is not finite and symmetric with a diagonal >= 0 */
    BW_ERR_SCALE = -12,      /* a stored scale that is not above zero, or not finite */
    BW_ERR_INTERRUPTED = -13 /* see bw_on_interrupt */
} bw_status;

typedef enum { BW_F32 = 0, BW_F16 = 1, BW_BF16 = 2 } bw_dtype;

/* A read-only strided matrix in memory; strides count elements and may be zero or negative.
 * `data` need not be aligned. */
typedef struct {
    const void *data;
    ptrdiff_t rows, cols, row_stride, col_stride;
    bw_dtype dtype;
} bw_matrix;

typedef struct {
    int32_t levels; /* 2, 3 (ternary), 4, 8, 16, 32, 64, 256 */
    int32_t symmetric;
    int64_t group_size; /* 16, 32, 64, 128 or -1 */
} bw_scheme;

/* Sizes of a stored matrix, all checked against overflow. Byte counts are per matrix unless named row_*. */
typedef struct {
    ptrdiff_t row_bytes;      /* codes of one row, padded to 4 bytes */
    ptrdiff_t n_groups;       /* groups in one row */
    ptrdiff_t group;          /* columns in a full group */
    ptrdiff_t row_zero_bytes; /* zeros of one row, 0 when symmetric */
    ptrdiff_t n_bytes;        /* codes + scales + zeros */
} bw_layout;

/* A stored matrix. The pointers are borrowed; zeros is NULL when symmetric. */
typedef struct {
    uint8_t *codes;
    uint16_t *scales;
    uint8_t *zeros;
    ptrdiff_t rows, cols;
    bw_scheme scheme;
} bw_quantized;

/* ---- scheme.c ---- */
bw_status bw_check_scheme(const bw_scheme *scheme);
bw_status bw_scheme_layout(const bw_scheme *scheme, ptrdiff_t rows, ptrdiff_t cols, bw_layout *layout);
/* The zero of a symmetric scheme: levels / 2, 0.5 or 1. */
float bw_symmetric_zero(int32_t levels);
/* Bits of one dense code, or of one stored zero (ternary zeros take 2). */
int bw_level_bits(int32_t levels);
bw_status bw_check_matrix(const bw_matrix *matrix);
bw_status bw_check_quantized(const bw_quantized *tensor, bw_layout *layout);

/* ---- cpu.c ---- */
/* Chooses the instruction set once: the best supported, or the one `forced` names (NULL = none).
 * BW_ERR_ARGUMENT when it is unknown or this CPU lacks it; the choice stands as it was. */
bw_status bw_choose_isa(const char *forced);
const char *bw_isa_name(void);
/* The i-th compiled instruction set and whether this CPU runs it; NULL past the end. */
const char *bw_isa_list(int i, int *supported);

/* ---- parallel.c ---- */
/* Number of threads that work on a call, the caller among them; 1 .. 1024. */
bw_status bw_set_num_threads(int n);
/* `ask` is called between two chunks of work, on any thread that works. Once it says yes, the verb ends soon with
 * BW_ERR_INTERRUPTED, its outputs partly written. */
typedef int (*bw_interrupt_fn)(void);
void bw_on_interrupt(bw_interrupt_fn ask);
/* Let the OpenMP threads that are in the process do the work, if there are any; 1 when there are. */
int bw_borrow_threads(void);
int bw_get_num_threads(void);

/* ---- blas.c ---- */
/* Build string of the OpenBLAS in use, and the core it chose at run time. */
const char *bw_blas_name(void);
const char *bw_blas_core(void);

/* ---- rtn.c ---- */
/* Round to nearest on the range of each group (min-max; range includes 0). Two symmetric levels:
 * +-mean|w|, which is the least squared error. Scales are rounded up to fp16, so that no value lies
 * further than half a step from its code. `out` points at arrays of bw_scheme_layout's sizes. */
bw_status bw_quantize_rtn(const bw_matrix *weight, const bw_quantized *out);

/* ---- clip.c ---- */
/* Round to nearest on the range of each group that gives the least sum of importance * error^2; scale and zero are
 * chosen together, and never do worse than bw_quantize_rtn's. importance: NULL for equal ones, or of the weight's
 * shape (row_stride 0: one row for all), >= 0. A group whose importance is all zero counts as equal. */
bw_status bw_quantize_clip(const bw_matrix *weight, const bw_matrix *importance, const bw_quantized *out);

/* ---- search.c ---- */
/* out[s] = sum row_importance * importance * (w - value)^2 under schemes[s], for all of them in one pass over the
 * weight. Ranges are those of bw_quantize_rtn, or with `clip` of bw_quantize_clip. importance: NULL, or of the
 * weight's shape, >= 0; row_importance: NULL, or one number >= 0 a row. */
bw_status bw_search(const bw_matrix *weight, const bw_scheme *schemes, ptrdiff_t n_schemes, const bw_matrix *importance,
                    const double *row_importance, int clip, double *out);

/* ---- loss.c ---- */
/* out[t] = -log softmax(logits[t])[targets[t]]. BW_ERR_INDEX when a target is outside 0 .. cols-1. A NaN or an infinite
 * largest logit gives NaN for that row alone, as softmax would. */
bw_status bw_cross_entropy(const bw_matrix *logits, const int64_t *targets, float *out);
/* out[t] = KL(softmax(reference[t]) || softmax(logits[t])) in nats; what has no probability in the reference
 * counts 0. */
bw_status bw_kl_divergence(const bw_matrix *reference, const bw_matrix *logits, float *out);
/* Sum of all values in fp64, always in the same order. */
bw_status bw_total(const bw_matrix *x, double *out);

/* ---- encode.c ---- */
/* Codes of a matrix on scales and zeros that are given: q = clamp(rint(w * (1/scale) + zero)). BW_ERR_NONFINITE,
 * or BW_ERR_SCALE, BW_ERR_CODE when the given ones are not legal. */
bw_status bw_encode(const bw_matrix *weight, const bw_quantized *out);

/* ---- dequantize.c ---- */
/* out (rows, cols) contiguous of `dtype`. BW_ERR_CODE when packed codes or zeros exceed the scheme, BW_ERR_SCALE. */
bw_status bw_dequantize(const bw_quantized *tensor, bw_dtype dtype, void *out);
/* out (n, cols) = the rows named by ids, in that order; any may repeat. BW_ERR_INDEX when one does not exist. */
bw_status bw_dequantize_rows(const bw_quantized *tensor, const int64_t *ids, ptrdiff_t n, bw_dtype dtype, void *out);

/* ---- matmul.c ---- */
/* At most this many tokens are multiplied straight from the packed codes. */
enum { BW_FEW_TOKENS = 16 };
/* How a product with few tokens takes its activations: as they are, or rounded on the fly to whole numbers of
 * 8 or 16 bits with a scale for each group, or each 64 columns of larger ones. More tokens are always taken as they
 * are. */
typedef enum { BW_EXACT = 0, BW_INT8 = 1, BW_INT16 = 2 } bw_mode;
/* out (m, rows), contiguous of `dtype`, = x (m, cols) WT + bias; bias (1, rows) or NULL. fp32 sums. What is not finite
 * in x reaches its own row only. BW_ERR_SCALE; BW_ERR_CODE with more than BW_FEW_TOKENS, while with fewer an illegal
 * code counts as some legal one. */
bw_status bw_matmul(const bw_matrix *x, const bw_quantized *weight, const bw_matrix *bias, bw_mode mode, bw_dtype dtype,
                    void *out);
/* The same for up to BW_MOST_TOGETHER weights: few tokens are prepared once and all threads are woken once. The same
 * bits as one at a time. */
enum { BW_MOST_TOGETHER = 4 };
bw_status bw_matmul_together(const bw_matrix *x, int n, const bw_quantized *const *weights,
                             const bw_matrix *const *biases, bw_mode mode, bw_dtype dtype, void *const *outs);

/* ---- hessian.c ---- */
/* h += xT D x for x (tokens, n), upper triangle of (n, n) only; with y (tokens, m), h += xT D y, all of (n, m).
 * D is the diagonal of `token_weights` (>= 0), ones when NULL. BW_ERR_NONFINITE when a sum is not finite. */
bw_status bw_hessian_add(const bw_matrix *x, const bw_matrix *y, const float *token_weights, float *h);
/* Copies the upper triangle of (n, n) over the lower one. */
bw_status bw_mirror_upper(ptrdiff_t n, float *h);

/* ---- align.c ---- */
/* out (rows, cols) = W + share * W (C - H)T (H + damping)^-1: what on inputs x comes nearest to W on inputs y, by
 * `share` (0..1) of the way; hessian H = E[x xT], cross C = E[x yT], both (cols, cols). Damping is a part of the mean
 * diagonal and grows when the factorisation fails. BW_ERR_HESSIAN, BW_ERR_FACTOR, BW_ERR_NONFINITE. */
bw_status bw_align(const bw_matrix *weight, const float *hessian, const float *cross, double share, double *damping,
                   float *out);

/* ---- gptq.c ---- */
typedef struct {
    double damping;        /* added to the diagonal of the Hessian, as a part of its mean; >= 0 */
    double tolerance;      /* refinement of 64 rows stops when a sweep gains less than this part of their error */
    int32_t sweeps;        /* refinement sweeps over all groups, at most; 0: GPTQ alone */
    int32_t by_activation; /* 1: most active groups, and columns within, first */
} bw_gptq_options;

typedef struct {
    double damping;     /* what the factorisation took */
    int64_t n_dead;     /* columns with hessian[j][j] = 0 */
    double *row_errors; /* (rows) or NULL: (w - q) H (w - q)T of each row, filled */
} bw_gptq_report;

/* GPTQ with ranges searched under its own error feedback, then refined on the same quadratic.
 * hessian (cols, cols) fp32, symmetric, diagonal >= 0; columns whose diagonal is 0 are rounded to nearest.
 * BW_ERR_HESSIAN, or BW_ERR_FACTOR when no damping makes it positive. */
bw_status bw_quantize_gptq(const bw_matrix *weight, const float *hessian, const bw_gptq_options *options,
                           const bw_quantized *out, bw_gptq_report *report);

/* ---- signround.c ---- */
/* A rounding under training: weight and offset (rows, cols), low and high (rows, n_groups), the ends of each group's
 * grid; low NULL when symmetric. */
typedef struct {
    const float *weight, *offset, *low, *high;
    ptrdiff_t rows, cols;
    bw_scheme scheme;
} bw_rounding;

/* values (rows, cols) = (q - zero) * scale, q = clamp(rint(weight / scale + zero + offset)); scale is rounded to fp16.
 */
bw_status bw_train_forward(const bw_rounding *rounding, float *values);
/* Gradients of a loss, from grad (rows, cols) with respect to values; roundings count as the identity. */
bw_status bw_train_backward(const bw_rounding *rounding, const float *grad, float *into_offset, float *into_low,
                            float *into_high);

/* ---- trellis.c ---- */
/* A matrix in trellis codes. Tiles of 16 x 16 weights, zeros beyond its edges, one column after the other: 256 weights,
 * each `rate` bits of a ring of 256 * rate bits, counted from the top of each byte. A weight's state is the `width`
 * bits that end with its own; hashed (codec/trellis.h), it is a whole number n within 510, and the weight n / 128 *
 * scale. */
typedef struct {
    uint8_t *codes;   /* (ceil(rows / 16), row_bytes): the tiles of 16 rows, from left to right, 32 * rate bytes each */
    uint16_t *scales; /* fp16 (rows), > 0 */
    uint8_t *rates;   /* (ceil(cols / 16)): bits a weight in those columns, 1 .. 5 */
    ptrdiff_t rows, cols;
    int32_t width;  /* of a state: 10 .. 16 bits */
    int32_t turned; /* 1: the tiles hold the matrix between Hadamard transforms, see trellis_turned.c */
} bw_trellis;

typedef struct {
    ptrdiff_t row_tiles, col_tiles;
    ptrdiff_t row_bytes; /* codes of 16 rows */
    ptrdiff_t n_bytes;   /* codes + scales + rates */
} bw_trellis_layout;

/* Sizes; BW_ERR_CODE when a rate is not 1 .. 5. bw_check_trellis: also BW_ERR_SHAPE when a turned matrix has no whole
 * blocks of 128 x 128, BW_ERR_ARGUMENT when its width is not 16, BW_ERR_CODE when its rates differ. */
bw_status bw_trellis_sizes(const uint8_t *rates, ptrdiff_t rows, ptrdiff_t cols, int32_t width,
                           bw_trellis_layout *layout);
bw_status bw_check_trellis(const bw_trellis *tensor, bw_trellis_layout *layout);
/* out (n, cols) contiguous of `dtype` = rows first .. first+n-1. BW_ERR_SCALE; BW_ERR_INDEX when there are fewer. */
bw_status bw_trellis_dequantize(const bw_trellis *tensor, ptrdiff_t first, ptrdiff_t n, bw_dtype dtype, void *out);
/* As bw_matmul. Modes count for at most BW_FEW_TOKENS, and cells are 64 columns. */
bw_status bw_trellis_matmul(const bw_matrix *x, const bw_trellis *weight, const bw_matrix *bias, bw_mode mode,
                            bw_dtype dtype, void *out);

/* ---- trellis_quantize.c ---- */
typedef struct {
    double damping;    /* as in bw_gptq_options */
    int32_t half_bits; /* twice the mean rate: 2 .. 10; of odd ones the columns that cost most get the higher rate */
    int32_t by_activation; /* 1: the 16 columns of most mean activation first */
    int32_t refit;         /* 1: scales by least squares at the end */
    int32_t thorough;      /* 1: the seam of each ring is sought all around it */
    int32_t turned; /* 1: `weight` is turned and of deviation 1 by now: tiles in EXL3's order, one scale for all */
} bw_trellis_options;

/* Fills codes, scales and rates. out->codes has room for row_tiles * bw_trellis_row_bytes. hessian as for GPTQ, or
 * NULL, then errors count by importance, one number a column, or NULL for equal ones. BW_ERR_RANGE when a row needs a
 * scale beyond fp16. */
bw_status bw_trellis_quantize(const bw_matrix *weight, const float *hessian, const float *importance,
                              const bw_trellis_options *options, const bw_trellis *out, bw_gptq_report *report);
/* Bits of each of n column tiles by what an error costs there (>= 0), at twice a mean rate: one rate for all, or the
 * higher one for the half that costs most; then single bits move to where they save most, but for turned tiles, which
 * EXL3 gives one rate. BW_ERR_ARGUMENT, BW_ERR_IMPORTANCE. */
bw_status bw_trellis_rates(const double *needs, ptrdiff_t n, int32_t half_bits, int32_t turned, uint8_t *rates);
/* Bytes of 16 rows at twice a mean rate; 0 when it is none. */
ptrdiff_t bw_trellis_row_bytes(ptrdiff_t cols, int32_t half_bits);

/* ---- decoder.c ---- */
/* A step of a decoder: a few new tokens through all its blocks, beside a cache of the keys and values before them.
 *
 *   h += scale * after_attention(o(attention(q, k, v of before_attention(h))))
 *   h += scale * after_mlp(mlp(before_mlp(h))), mlp(x) = down(activation(gate(x)) * up(x));  at the end final(h)
 *
 * Numbers between two parts are rounded to `dtype`, the model's own; sums are fp32. */
enum { BW_MOST_STEP = 16, BW_MOST_ROPES = 4 };
typedef enum { BW_PACKED = 0, BW_TRELLIS = 1, BW_PLAIN = 2 } bw_linear_kind;

/* A linear layer. Of packed, trellis and plain the one that `kind` names counts. */
typedef struct {
    bw_linear_kind kind;
    bw_quantized packed;
    bw_trellis trellis;
    bw_matrix plain; /* (rows, cols), columns next to each other */
    bw_matrix bias;  /* (1, rows), or data NULL */
    int late_bias;   /* 1: added to products that are rounded already */
    bw_mode mode;
    ptrdiff_t rows, cols;
} bw_linear;

/* Rows first .. first+rows-1 of a layer; linear NULL: nothing. */
typedef struct {
    const bw_linear *linear;
    ptrdiff_t first, rows;
} bw_part;

/* How a norm by the root mean square takes its gain w: not at all; w times the rounded row; w times the row; (1 + w)
 * times the row. */
typedef enum { BW_GAIN_NONE = 0, BW_GAIN_ROUNDED = 1, BW_GAIN_DIRECT = 2, BW_GAIN_PLUS_ONE = 3 } bw_gain;

typedef struct {
    int present;
    bw_gain kind;
    float eps;
    bw_matrix gain; /* (1, n); not read with BW_GAIN_NONE */
} bw_norm;

/* BW_CLAMPED: of a gate g and an up u, (u + 1) * g / (1 + exp(-alpha * g)), g at most `limit` and u within it. */
typedef enum {
    BW_SILU = 0,
    BW_GELU = 1,
    BW_GELU_TANH = 2,
    BW_RELU = 3,
    BW_RELU_SQUARED = 4,
    BW_CLAMPED = 5
} bw_activation;

typedef struct {
    bw_part gate, up, down; /* gate may be nothing; then the activation is up's */
} bw_mlp;

/* How `n` logits choose experts, as many as `chosen`, and their weights: a softmax over all logits, or over those of
 * the chosen ones, divided by the chosen ones' sum or not, rounded to `dtype`. */
typedef struct {
    ptrdiff_t n, chosen;
    int over_all, divided;
    bw_dtype dtype;
} bw_routing;

/* Experts: mlp(x) = sum of weight * expert(x) over those that router(x) chooses, each product rounded to the weights'
 * dtype; plus sigmoid(shared_gate(x)) times the block's own mlp, where it has one. routing.n 0: no experts. */
typedef struct {
    bw_routing routing;
    bw_part router, shared_gate; /* shared_gate may be nothing: times 1 */
    const bw_mlp *experts;       /* routing.n */
    int pairs;                   /* 1: they have no gate, and rows of up are a gate's and an up's in turns */
} bw_mixture;

typedef struct {
    bw_part q, k, v, o;
    bw_mlp mlp; /* may be nothing where there are experts */
    bw_mixture mixture;
    bw_norm before_attention, q_norm, k_norm, after_attention, before_mlp, after_mlp;
    bw_matrix sinks;  /* (1, heads): of each head a logit that takes its share and gives nothing; or data NULL */
    ptrdiff_t window; /* tokens that one sees, itself included; 0: all */
    int rope;         /* which table; -1: none */
    int room;         /* where keys and values lie, and at which place there */
    ptrdiff_t place;
} bw_decoder_block;

typedef struct {
    const bw_decoder_block *blocks;
    ptrdiff_t n_blocks, hidden;
    ptrdiff_t heads, kv_heads, dim;                       /* dim: of a head */
    int norm_by_head;                                     /* 1: q_norm and k_norm see a head, 0: all heads */
    float attention_scale, attention_cap, residual_scale; /* cap 0: none */
    bw_activation activation;
    float alpha, limit; /* of BW_CLAMPED */
    bw_dtype dtype;
    bw_norm final;
} bw_decoder;

/* Keys and values of some blocks: (places, 2, batch, kv_heads, capacity, dim) of the decoder's dtype, of which rows
 * start .. end-1 of the capacity hold the last tokens of `seen`. */
typedef struct {
    char *data;
    ptrdiff_t places, capacity, start, end, seen;
} bw_room;

/* Cosines and sines of (tokens, n), n even and at most dim; `steps` 1: each product of a rotation is rounded. */
typedef struct {
    const float *cosine, *sine;
    ptrdiff_t n;
    int steps;
} bw_rope;

typedef struct {
    ptrdiff_t batch, n_new; /* batch * n_new tokens, at most BW_MOST_STEP, sequence by sequence */
    const void *x;          /* (tokens, hidden) of the decoder's dtype, contiguous */
    void *out;              /* the same; what the final norm gives */
    const bw_rope *ropes;
    int n_ropes;
    const bw_room *rooms; /* with room for n_new tokens after `end`, which are written there */
    int n_rooms;
    const int64_t *padding; /* (batch) tokens at the start that nobody sees, or NULL */
    const int64_t *experts; /* those that are to be chosen, (tokens, chosen) of each block that has any; or NULL */
    ptrdiff_t n_experts;    /* how many numbers these are */
} bw_step;

/* BW_ERR_SHAPE, BW_ERR_ARGUMENT, BW_ERR_INDEX (rooms, ropes, places) before anything is written; BW_ERR_SCALE. */
bw_status bw_decode(const bw_decoder *decoder, const bw_step *step);

/* ---- decoder_experts.c ---- */
enum { BW_MOST_EXPERTS = 4096, BW_MOST_CHOSEN = 64 };
/* Of each row of logits (rows, routing->n), contiguous: the experts that are chosen, the best one first, those that
 * torch.topk takes among equal ones, and their weights; (rows, routing->chosen) each. BW_ERR_ARGUMENT. */
bw_status bw_route(const bw_routing *routing, const float *logits, ptrdiff_t rows, int64_t *experts, float *weights);

/* ---- pack.c ---- */
/* codes (rows, cols) one byte each <-> packed (rows, row_bytes). Padding bits are zero. */
bw_status bw_pack(const uint8_t *codes, ptrdiff_t rows, ptrdiff_t cols, int32_t levels, uint8_t *packed);
bw_status bw_unpack(const uint8_t *packed, ptrdiff_t rows, ptrdiff_t cols, int32_t levels, uint8_t *codes);

#endif
