/* Trellis codes back to numbers, and products with them. */
#include <stdatomic.h>
#include <string.h>

#include "alloc.h"
#include "blas.h"
#include "codec/trellis.h"
#include "cpu.h"
#include "parallel.h"
#include "scheme.h"
#include "trellis_turned.h"

enum { SIDE = BW_TRELLIS_SIDE, CELL = 64, MANY_ROWS = 64, BLOCK_TOKENS = 512 };

static ptrdiff_t tiles_in(ptrdiff_t n) {
    return n / SIDE + (n % SIDE != 0);
}

static ptrdiff_t lesser(ptrdiff_t a, ptrdiff_t b) {
    return a < b ? a : b;
}

ptrdiff_t bw_trellis_row_bytes(ptrdiff_t cols, int32_t half_bits) {
    if (cols < 0 || cols > BW_MOST_VALUES || half_bits < 2 || half_bits > 10) return 0;
    ptrdiff_t tiles = tiles_in(cols), higher = half_bits % 2 ? (tiles + 1) / 2 : 0;
    return (tiles * (half_bits / 2) + higher) * 2 * SIDE;
}

bw_status bw_trellis_sizes(const uint8_t *rates, ptrdiff_t rows, ptrdiff_t cols, int32_t width,
                           bw_trellis_layout *layout) {
    if (width < BW_TRELLIS_LEAST_WIDTH || width > BW_TRELLIS_MOST_WIDTH) return BW_ERR_ARGUMENT;
    bw_status status = bw_check_shape(rows, cols);
    if (status) return status;
    bw_trellis_layout l = {.row_tiles = tiles_in(rows), .col_tiles = tiles_in(cols)};
    if (l.col_tiles && !rates) return BW_ERR_ARGUMENT;
    for (ptrdiff_t t = 0; t < l.col_tiles; t++) {
        if (rates[t] < 1 || rates[t] > BW_TRELLIS_MOST_RATE) return BW_ERR_CODE;
        l.row_bytes += rates[t] * 2 * SIDE;
    }
    if (bw_multiply(l.row_tiles, l.row_bytes, &l.n_bytes)) return BW_ERR_OVERFLOW;
    l.n_bytes += rows * 2 + l.col_tiles; /* bw_check_shape leaves room */
    *layout = l;
    return BW_OK;
}

bw_status bw_check_trellis(const bw_trellis *t, bw_trellis_layout *layout) {
    bw_status status = bw_trellis_sizes(t->rates, t->rows, t->cols, t->width, layout);
    if (!status && t->turned) status = bw_check_turned(t, layout);
    if (status || !t->rows || !t->cols) return status;
    return t->codes && t->scales ? BW_OK : BW_ERR_ARGUMENT;
}

bw_status bw_load_steps(const bw_trellis *t, ptrdiff_t row, ptrdiff_t n, float *steps) {
    int bad = 0;
    const bw_matrix scales = {t->scales, 1, t->rows, t->rows, 1, BW_F16};
    memset(steps, 0, (size_t)(tiles_in(n) * SIDE) * sizeof *steps);
    bw_cpu()->load_row(&scales, 0, row, n, steps);
    for (ptrdiff_t i = 0; i < n; i++) {
        bad |= !(steps[i] > 0 && steps[i] <= 65504);
        steps[i] *= BW_TRELLIS_STEP;
    }
    return bad ? BW_ERR_SCALE : BW_OK;
}

/* Columns of one row of tiles, `stride` apart. */
static void decode_tiles(const bw_trellis *t, const bw_trellis_layout *l, ptrdiff_t row_tile, const float *steps,
                         float *out, ptrdiff_t stride) {
    bw_cpu()->trellis_decode(t->codes + row_tile * l->row_bytes, t->rates, l->col_tiles, t->width, row_tile == 0, steps,
                             out, stride);
}

typedef struct {
    const bw_trellis *tensor;
    bw_trellis_layout layout;
    ptrdiff_t first, n;
    bw_dtype dtype;
    char *out, *scratch;
    ptrdiff_t scratch_bytes;
    atomic_int status;
} decode_job;

static void decode_chunk(void *context, ptrdiff_t chunk, int worker) {
    decode_job *job = context;
    const bw_trellis *t = job->tensor;
    ptrdiff_t tile = job->first / SIDE + chunk, row = tile * SIDE, end = lesser(job->first + job->n, row + SIDE),
              padded = job->layout.col_tiles * SIDE, size = job->dtype == BW_F32 ? 4 : 2;
    float steps[SIDE], *columns = (float *)(job->scratch + worker * job->scratch_bytes),
                       *rows = columns + padded * SIDE;
    if (bw_load_steps(t, row, lesser(t->rows - row, SIDE), steps)) {
        atomic_store(&job->status, BW_ERR_SCALE);
        return;
    }
    decode_tiles(t, &job->layout, tile, steps, columns, SIDE);
    bw_cpu()->transpose(columns, padded, rows, padded);
    for (ptrdiff_t r = row < job->first ? job->first : row; r < end; r++)
        bw_cpu()->store(rows + (r - row) * padded, t->cols, job->dtype, job->out + (r - job->first) * t->cols * size);
}

bw_status bw_trellis_dequantize(const bw_trellis *tensor, ptrdiff_t first, ptrdiff_t n, bw_dtype dtype, void *out) {
    decode_job job = {.tensor = tensor, .first = first, .n = n, .dtype = dtype, .out = out};
    bw_status status = bw_check_trellis(tensor, &job.layout);
    if (status) return status;
    if (dtype != BW_F32 && dtype != BW_F16 && dtype != BW_BF16) return BW_ERR_ARGUMENT;
    if (first < 0 || n < 0 || first > tensor->rows || n > tensor->rows - first) return BW_ERR_INDEX;
    if (!n || !tensor->cols) return BW_OK;
    if (!out) return BW_ERR_ARGUMENT;
    if (tensor->turned) return bw_turned_dequantize(tensor, &job.layout, first, n, dtype, out);
    ptrdiff_t n_chunks = (first + n - 1) / SIDE - first / SIDE + 1;
    int n_workers = bw_n_workers(n_chunks);
    job.scratch_bytes = bw_aligned(job.layout.col_tiles * SIDE * SIDE * 2 * 4);
    job.scratch = bw_alloc(n_workers, job.scratch_bytes);
    if (!job.scratch) return BW_ERR_MEMORY;
    status = bw_parallel_for(n_workers, n_chunks, decode_chunk, &job);
    bw_free(job.scratch);
    return status ? status : (bw_status)atomic_load(&job.status);
}

typedef struct {
    const bw_matrix *x, *bias;
    const bw_trellis *weight;
    bw_trellis_layout layout;
    bw_dtype dtype;
    char *out;
    bw_trellis_few few;
    const float *values; /* many tokens: (m, cols), contiguous */
    char *scratch;
    ptrdiff_t scratch_bytes, tiles_per_chunk;
    atomic_int status;
} product_job;

/* Adds the bias to sums of at most MANY_ROWS rows from `row` on and stores them. */
static void finish(const product_job *p, ptrdiff_t token, ptrdiff_t row, ptrdiff_t n, float *sums) {
    float bias[MANY_ROWS];
    if (p->bias) bw_cpu()->load_row(p->bias, 0, row, n, bias);
    for (ptrdiff_t r = 0; p->bias && r < n; r++) sums[r] += bias[r];
    ptrdiff_t size = p->dtype == BW_F32 ? 4 : 2;
    bw_cpu()->store(sums, n, p->dtype, p->out + (token * p->weight->rows + row) * size);
}

static void multiply_few_chunk(void *context, ptrdiff_t chunk, int worker) {
    product_job *p = context;
    (void)worker;
    ptrdiff_t first = chunk * p->tiles_per_chunk, end = lesser(first + p->tiles_per_chunk, p->layout.row_tiles);
    for (ptrdiff_t tile = first; tile < end; tile++) {
        float steps[SIDE], sums[BW_FEW_TOKENS * SIDE];
        ptrdiff_t row = tile * SIDE, n = lesser(p->weight->rows - row, SIDE);
        if (bw_load_steps(p->weight, row, n, steps)) atomic_store(&p->status, BW_ERR_SCALE);
        bw_cpu()->trellis_multiply(&p->few, tile, p->x->rows, steps, sums);
        for (ptrdiff_t t = 0; t < p->x->rows; t++) finish(p, t, row, n, sums + t * SIDE);
    }
}

static bw_status multiply_few(product_job *p, int digits) {
    ptrdiff_t padded = (p->x->cols + CELL - 1) / CELL * CELL, m = p->x->rows;
    p->few = (bw_trellis_few){p->weight->codes,
                              p->weight->rates,
                              p->layout.col_tiles,
                              p->layout.row_bytes,
                              padded,
                              0,
                              NULL,
                              p->weight->width,
                              digits};
    p->few.token_bytes = bw_aligned(digits ? padded * 8 + padded / CELL * 8 : padded * 4);
    char *memory = bw_alloc(m + 1, p->few.token_bytes);
    if (!memory) return BW_ERR_MEMORY;
    float *room = (float *)(memory + m * p->few.token_bytes);
    for (ptrdiff_t t = 0; t < m; t++) {
        char *token = memory + t * p->few.token_bytes;
        float *values = digits ? room : (float *)token;
        memset(values, 0, (size_t)padded * 4);
        bw_cpu()->load_row(p->x, t, 0, p->x->cols, values);
        if (digits) bw_cpu()->trellis_token(&p->few, values, token);
    }
    p->few.tokens = memory;
    ptrdiff_t tiles = p->layout.row_tiles / (4 * bw_n_workers(p->layout.row_tiles));
    p->tiles_per_chunk = tiles ? tiles : 1;
    ptrdiff_t n_chunks = (p->layout.row_tiles - 1) / p->tiles_per_chunk + 1;
    bw_status status = bw_parallel_for(bw_n_workers(n_chunks), n_chunks, multiply_few_chunk, p);
    bw_free(memory);
    return status;
}

/* All tokens times MANY_ROWS rows, which are decoded once. */
static void multiply_many_chunk(void *context, ptrdiff_t chunk, int worker) {
    product_job *p = context;
    ptrdiff_t cols = p->x->cols, padded = p->layout.col_tiles * SIDE, row = chunk * MANY_ROWS,
              n = lesser(p->weight->rows - row, MANY_ROWS);
    float steps[MANY_ROWS], *tile = (float *)(p->scratch + worker * p->scratch_bytes),
                            *sums = tile + padded * MANY_ROWS;
    if (bw_load_steps(p->weight, row, n, steps)) {
        atomic_store(&p->status, BW_ERR_SCALE);
        return;
    }
    for (ptrdiff_t r = 0; r < n; r += SIDE)
        decode_tiles(p->weight, &p->layout, (row + r) / SIDE, steps + r, tile + r, MANY_ROWS);
    for (ptrdiff_t token = 0; token < p->x->rows; token += BLOCK_TOKENS) {
        ptrdiff_t m = lesser(p->x->rows - token, BLOCK_TOKENS);
        bw_sgemm(0, 0, m, n, cols, 1, p->values + token * cols, cols, tile, MANY_ROWS, 0, sums, MANY_ROWS);
        for (ptrdiff_t t = 0; t < m; t++) finish(p, token + t, row, n, sums + t * MANY_ROWS);
    }
}

static bw_status multiply_many(product_job *p) {
    ptrdiff_t n_chunks = (p->weight->rows - 1) / MANY_ROWS + 1;
    int n_workers = bw_n_workers(n_chunks);
    p->scratch_bytes = bw_aligned((p->layout.col_tiles * SIDE + BLOCK_TOKENS) * MANY_ROWS * 4);
    p->scratch = bw_alloc(n_workers, p->scratch_bytes);
    float *room = bw_alloc(p->x->rows, p->x->cols * 4);
    bw_status status = BW_ERR_MEMORY;
    if (p->scratch && room) {
        for (ptrdiff_t i = 0; i < p->x->rows; i++) bw_cpu()->load_row(p->x, i, 0, p->x->cols, room + i * p->x->cols);
        p->values = room;
        status = bw_parallel_for(n_workers, n_chunks, multiply_many_chunk, p);
    }
    bw_free(p->scratch);
    bw_free(room);
    return status;
}

bw_status bw_trellis_matmul(const bw_matrix *x, const bw_trellis *weight, const bw_matrix *bias, bw_mode mode,
                            bw_dtype dtype, void *out) {
    product_job p = {.x = x, .bias = bias, .weight = weight, .dtype = dtype, .out = out};
    bw_status status = bw_check_matrix(x);
    if (!status) status = bw_check_trellis(weight, &p.layout);
    if (!status && bias) status = bw_check_matrix(bias);
    if (status) return status;
    if (dtype != BW_F32 && dtype != BW_F16 && dtype != BW_BF16) return BW_ERR_ARGUMENT;
    if (mode != BW_EXACT && mode != BW_INT8 && mode != BW_INT16) return BW_ERR_ARGUMENT;
    if (x->cols != weight->cols) return BW_ERR_SHAPE;
    if (bias && (bias->rows != 1 || bias->cols != weight->rows)) return BW_ERR_SHAPE;
    ptrdiff_t n;
    if (bw_multiply(x->rows, weight->rows, &n) || bw_multiply(n, 8, &n)) return BW_ERR_OVERFLOW;
    if (!n) return BW_OK;
    if (!out) return BW_ERR_ARGUMENT;
    if (!x->cols) { /* the sum over no columns */
        for (ptrdiff_t t = 0; t < x->rows; t++)
            for (ptrdiff_t row = 0; row < weight->rows; row += MANY_ROWS) {
                float sums[MANY_ROWS] = {0};
                finish(&p, t, row, lesser(weight->rows - row, MANY_ROWS), sums);
            }
        return BW_OK;
    }
    if (weight->turned) return bw_turned_matmul(x, weight, &p.layout, bias, dtype, out);
    status = x->rows <= BW_FEW_TOKENS ? multiply_few(&p, (int)mode) : multiply_many(&p);
    return status ? status : (bw_status)atomic_load(&p.status);
}
