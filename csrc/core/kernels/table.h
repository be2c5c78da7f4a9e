/* One instruction set: its name and its inner loops. Each isa/<name>.c fills one of these.
 *
 * Every vector has 16 lanes on every instruction set (one register with AVX-512, two with AVX2, four
 * with NEON, an array otherwise) and sums fold in one fixed order. So a kernel that
 * avoids bw_fma gives the same bytes everywhere by construction. */
#ifndef BW_KERNELS_TABLE_H
#define BW_KERNELS_TABLE_H

#include "../bitween.h"

/* A tile: rows that kernels/gptq.h works on at once, one lane each. Arrays are (columns, BW_TILE_ROWS). */
enum { BW_TILE_ROWS = 64 };

typedef struct {
    const float *weight;   /* what is approximated */
    const float *base;     /* what each column is rounded from, before the feedback of columns before it */
    const float *feedback; /* row k, `stride` apart: factors of the errors of columns 0 .. k-1 in column k */
    const float *variance; /* (n): cost of a squared miss in each column */
    ptrdiff_t stride, n;
    float top; /* levels - 1 */
} bw_tile;

/* Scale, its inverse and zero of one group, row by row. */
typedef struct {
    float scales[BW_TILE_ROWS], inverses[BW_TILE_ROWS], zeros[BW_TILE_ROWS];
} bw_tile_grid;
/* The main loop of a product takes so many rows and tokens at once; cells of either are padded with zeros. */
enum { BW_ROWS_AT_ONCE = 4, BW_TOKENS_AT_ONCE = 4 };

static inline ptrdiff_t bw_padded_cells(ptrdiff_t n) {
    return (n + 15) / 16 * 16;
}

/* A product with a few tokens at work; kernels/product.h tells what a unit, a cell and a prepared token are. */
typedef struct {
    const bw_quantized *weight;
    const bw_layout *layout;
    const char *tokens; /* prepared, token_bytes apart */
    ptrdiff_t token_bytes;
    ptrdiff_t n_units, n_cells;
    ptrdiff_t reach, scale_reach, zero_reach; /* bytes that kernels may read from the start of a row's array */
    ptrdiff_t direct_rows;                    /* the first so many rows may be read that far where they are */
    ptrdiff_t rows_ahead;                     /* those of later rows that are fetched into the cache meanwhile */
    int digits;                               /* bytes of a rounded activation; 0 = exact */
    int bits;                                 /* of a dense code, or of a zero */
    int order;                                /* of a token's whole numbers, as `token_order` gives it */
    float zero;                               /* of a symmetric scheme */
    int cell_shift, group_shift;              /* column >> shift is its cell, its group */
    int32_t lanes[16];                        /* cell of each lane of a unit, counted from the unit's first */
    int32_t units[16];                        /* group of each of 16 units, counted from the first one's */
} bw_few;

/* Rows that one call of multiply_rows may work on, and the stride of its sums. */
enum { BW_FEW_ROWS = 64 };

/* A walk along n weights of a tile's sequence, which is a ring, from weight `first` on. values: tables of all states,
 * one for each of the 16 columns; columns: that of each weight; x: the weights, in the same units. costs: (n + 1) rows
 * of a cost a group, `stride` apart, of which the first is given and the others are filled; 16 more may be read. */
typedef struct {
    int width, rate, first, n;
    const int16_t *values[16];
    const uint8_t *columns; /* (256) */
    const int16_t *x;
    uint16_t *costs;
    ptrdiff_t stride;
} bw_walk;

/* A product of a trellis matrix with a few tokens. */
typedef struct {
    const uint8_t *codes, *rates;
    ptrdiff_t n_tiles, row_bytes; /* in a row of tiles */
    ptrdiff_t padded;             /* columns, in whole cells of 64 */
    ptrdiff_t token_bytes;
    const char *tokens; /* digits 0: fp32; otherwise as trellis_token makes them */
    int width, digits;
} bw_trellis_few;

/* Attention of some heads to the same keys and values, rows of `dim` numbers of `dtype` without gaps. */
enum { BW_MOST_HEAD = 512 };

typedef struct {
    ptrdiff_t dim;          /* of a head, at most BW_MOST_HEAD */
    ptrdiff_t query_stride; /* from one head's query to the next */
    ptrdiff_t out_stride;   /* from one head's result to the next */
    ptrdiff_t stride;       /* from one head's scores to the next */
    int n_heads;
    float scale;
    bw_dtype dtype;
} bw_attend;

typedef struct {
    const char *name;
    int rank;               /* higher is preferred */
    int (*supported)(void); /* does this CPU, and its operating system, run the set? */

    /* kernels/convert.h: elements first .. first+n-1 of a matrix row to fp32; fp32 to `dtype`, contiguous. */
    void (*load_row)(const bw_matrix *matrix, ptrdiff_t row, ptrdiff_t first, ptrdiff_t n, float *out);
    void (*store)(const float *values, ptrdiff_t n, bw_dtype dtype, void *out);

    /* kernels/codec.h: n codes, one byte each <-> packed bits. unpack returns the largest code it saw.
     * Both may touch only the ceil(n * bits / 8) packed bytes. */
    void (*pack)(const uint8_t *codes, ptrdiff_t n, int32_t levels, uint8_t *packed);
    int (*unpack)(const uint8_t *packed, ptrdiff_t n, int32_t levels, uint8_t *codes);

    /* kernels/rtn.h: one row of `cols` values in groups of `group`. zeros: one float a group. */
    bw_status (*rtn_grid)(const float *w, ptrdiff_t cols, ptrdiff_t group, const bw_scheme *scheme, uint16_t *scales,
                          float *zeros);
    void (*encode_row)(const float *w, ptrdiff_t cols, ptrdiff_t group, int32_t levels, const uint16_t *scales,
                       const float *zeros, uint8_t *codes);
    void (*decode_row)(const uint8_t *codes, ptrdiff_t cols, ptrdiff_t group, const uint16_t *scales,
                       const float *zeros, bw_dtype dtype, void *out);

    /* kernels/clip.h: as rtn_grid, with the least sum of importance * error^2. importance: `cols` values, >= 0 and
     * at most about 1e20, or NULL for equal ones. */
    bw_status (*clip_grid)(const float *w, ptrdiff_t cols, ptrdiff_t group, const bw_scheme *scheme,
                           const float *importance, uint16_t *scales, float *zeros);

    /* kernels/search.h: ranges of each 16 columns; min-max grids of n groups from ranges (arrays of whole vectors; not
     * for two symmetric levels); sum m (w - value)^2 of a row, w and m padded to whole vectors, m with zeros. */
    bw_status (*find_ranges)(const float *w, ptrdiff_t cols, float *low, float *high);
    bw_status (*range_grid)(const float *low, const float *high, ptrdiff_t n, const bw_scheme *scheme, float *scales,
                            float *zeros);
    float (*grid_error)(const float *w, const float *m, ptrdiff_t cols, ptrdiff_t group, int32_t levels,
                        const float *scales, const float *zeros);

    /* kernels/gptq.h; each is explained there. errors, pull, base, levels: (n, BW_TILE_ROWS). */
    void (*tile_round)(const bw_tile *tile, const bw_tile_grid *grid, float *errors, uint8_t *codes, float *costs);
    void (*tile_try)(const bw_tile *tile, const bw_tile_grid *start, float ratio, float shift, float *errors,
                     bw_tile_grid *best, float *best_costs);
    void (*tile_keep)(ptrdiff_t n, const float *before, const float *after, const bw_tile_grid *trial,
                      const float *trial_errors, const uint8_t *trial_codes, bw_tile_grid *grid, float *errors,
                      uint8_t *codes);
    void (*tile_cost)(const bw_tile *tile, const float *errors, float *costs);
    void (*tile_aim)(const bw_tile *tile, float *pull, float *base);
    int (*tile_descend)(const bw_tile *tile, const float *hessian, ptrdiff_t stride, const float *pull,
                        const bw_tile_grid *grid, float *errors, uint8_t *codes);
    void (*tile_refit)(const bw_tile *tile, const float *hessian, ptrdiff_t stride, const float *pull,
                       bw_tile_grid *grid, float *levels, float *errors, const uint8_t *codes);

    /* kernels/loss.h: over blocks of whole vectors, padded with -infinity: the largest; sum exp(x - max); the three
     * sums of a KL divergence, added to `sums`. */
    float (*block_max)(const float *x, ptrdiff_t n);
    float (*block_exp)(const float *x, ptrdiff_t n, float max);
    void (*block_kl)(const float *a, const float *b, ptrdiff_t n, float a_max, float b_max, double *sums);

    /* kernels/product.h: x, padded with zeros to whole units, to whole numbers; out (n_tokens, n), fp32 and
     * rows BW_FEW_ROWS apart, = tokens times n rows from `row` on, or BW_ERR_SCALE. */
    int (*token_order)(int bits); /* of whole numbers that meet dense codes of so many bits; 0: as other codes */
    void (*prepare_token)(const bw_few *job, const float *x, char *token);
    bw_status (*multiply_rows)(const bw_few *job, ptrdiff_t row, ptrdiff_t n, ptrdiff_t n_tokens, char *scratch,
                               float *out);

    /* kernels/trellis.h, where each is explained. */
    void (*trellis_walk)(const bw_walk *walk);
    void (*trellis_values)(const int16_t *values, ptrdiff_t n, int factor, int16_t *out);
    void (*trellis_decode)(const uint8_t *codes, const uint8_t *rates, ptrdiff_t n_tiles, int width, int at_start,
                           const float *scales, float *out, ptrdiff_t stride);
    void (*transpose)(const float *columns, ptrdiff_t n, float *rows, ptrdiff_t stride);
    void (*trellis_token)(const bw_trellis_few *job, const float *x, char *token);
    void (*trellis_multiply)(const bw_trellis_few *job, ptrdiff_t row_tile, ptrdiff_t n_tokens, const float *scales,
                             float *out);

    /* kernels/decode.h, where each is explained. Rows are padded with zeros to whole vectors. */
    void (*round_row)(float *x, ptrdiff_t n, bw_dtype dtype);
    void (*add_row)(float *x, const float *y, ptrdiff_t n, float scale, bw_dtype dtype);
    void (*mix_row)(float *sum, const float *y, ptrdiff_t n, float weight, bw_dtype dtype);
    void (*norm_row)(const float *x, ptrdiff_t n, const float *gain, float eps, bw_gain kind, bw_dtype dtype,
                     float *out);
    void (*rotate_row)(float *x, ptrdiff_t n, const float *cosine, const float *sine, int steps, bw_dtype dtype);
    void (*activate_row)(float *x, const float *up, ptrdiff_t n, bw_activation kind, bw_dtype dtype);
    void (*clamped_row)(float *x, const float *up, ptrdiff_t n, float alpha, float limit, bw_dtype dtype);
    void (*attend_scores)(const bw_attend *job, const float *queries, const char *keys, ptrdiff_t n, float *scores);
    float (*attend_weights)(float *scores, ptrdiff_t n, float cap);
    void (*attend_mix)(const bw_attend *job, const float *weights, const float *totals, const char *values, ptrdiff_t n,
                       float *out);
    void (*dense_rows)(const bw_matrix *weight, ptrdiff_t first, ptrdiff_t n, const float *x, float *out);

    /* kernels/signround.h: one row; low, high and their gradients one value a group. */
    void (*train_forward)(const float *w, const float *offset, const float *low, const float *high, ptrdiff_t cols,
                          ptrdiff_t group, const bw_scheme *scheme, float *out);
    void (*train_backward)(const float *w, const float *offset, const float *low, const float *high, const float *grad,
                           ptrdiff_t cols, ptrdiff_t group, const bw_scheme *scheme, float *into_offset,
                           float *into_low, float *into_high);
} bw_isa;

#endif
