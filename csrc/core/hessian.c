/* Second moments of a layer's inputs: h += xT D x, and cross moments xT D y.
 *
 * Tokens are taken in blocks: rows to fp32 first (times the square root of their weight), then tiles of h by single-
 * threaded products. Which tile adds what, and in which order, is fixed, so that sums do not depend on the threads. */
#include <math.h>
#include <stdatomic.h>

#include "alloc.h"
#include "blas.h"
#include "cpu.h"
#include "parallel.h"
#include "scheme.h"

enum { TOKENS = 1024, TILE = 192, ROWS_PER_CHUNK = 64 };

typedef struct {
    const float *data;
    ptrdiff_t stride;
} block;

typedef struct {
    const bw_matrix *x, *y; /* y NULL: symmetric */
    const float *weights;
    float *h;
    ptrdiff_t first, n_tokens; /* of the block at work */
    ptrdiff_t tiles_across;    /* of h */
    float *x_scratch, *y_scratch;
    block x_block, y_block;
} job;

/* May the block be read in place? */
static int usable(const bw_matrix *m) {
    return m->dtype == BW_F32 && m->col_stride == 1 && m->row_stride >= m->cols && m->row_stride <= INT32_MAX &&
           (uintptr_t)m->data % 4 == 0;
}

static void convert_rows(void *context, ptrdiff_t chunk, int worker) {
    (void)worker;
    const job *j = context;
    ptrdiff_t end = (chunk + 1) * ROWS_PER_CHUNK;
    if (end > j->n_tokens) end = j->n_tokens;
    for (ptrdiff_t i = chunk * ROWS_PER_CHUNK; i < end; i++) {
        ptrdiff_t token = j->first + i;
        float root = j->weights ? sqrtf(j->weights[token]) : 1.0f;
        for (int side = 0; side < 2; side++) {
            const bw_matrix *m = side ? j->y : j->x;
            float *row = side ? j->y_scratch : j->x_scratch;
            if (!m || !row) continue;
            row += i * m->cols;
            bw_cpu()->load_row(m, token, 0, m->cols, row);
            if (j->weights)
                for (ptrdiff_t c = 0; c < m->cols; c++) row[c] *= root;
        }
    }
}

static void add_tile(void *context, ptrdiff_t chunk, int worker) {
    (void)worker;
    const job *j = context;
    const bw_matrix *right = j->y ? j->y : j->x;
    const block *b = j->y ? &j->y_block : &j->x_block;
    ptrdiff_t r = chunk / j->tiles_across * TILE, c = chunk % j->tiles_across * TILE;
    ptrdiff_t m = j->x->cols - r < TILE ? j->x->cols - r : TILE, n = right->cols - c < TILE ? right->cols - c : TILE;
    float *h = j->h + r * right->cols + c;
    if (!j->y && c < r) return;
    if (!j->y && c == r) bw_ssyrk(n, j->n_tokens, 1, j->x_block.data + r, j->x_block.stride, 1, h, right->cols);
    else
        bw_sgemm(1, 0, m, n, j->n_tokens, 1, j->x_block.data + r, j->x_block.stride, b->data + c, b->stride, 1, h,
                 right->cols);
}

static block place(const bw_matrix *m, const float *scratch, ptrdiff_t first) {
    if (scratch) return (block){scratch, m->cols};
    return (block){(const float *)m->data + first * m->row_stride, m->row_stride};
}

static bw_status add_blocks(job *j) {
    bw_status status = BW_OK;
    ptrdiff_t tiles_down = (j->x->cols + TILE - 1) / TILE, n_tiles = tiles_down * j->tiles_across;
    for (j->first = 0; j->first < j->x->rows && !status; j->first += TOKENS) {
        j->n_tokens = j->x->rows - j->first < TOKENS ? j->x->rows - j->first : TOKENS;
        ptrdiff_t n_chunks = (j->n_tokens + ROWS_PER_CHUNK - 1) / ROWS_PER_CHUNK;
        if (j->x_scratch || j->y_scratch) status = bw_parallel_for(bw_n_workers(n_chunks), n_chunks, convert_rows, j);
        if (status) return status;
        j->x_block = place(j->x, j->x_scratch, j->first);
        if (j->y) j->y_block = place(j->y, j->y_scratch, j->first);
        status = bw_parallel_for(bw_n_workers(n_tiles), n_tiles, add_tile, j);
    }
    return status;
}

static bw_status check_weights(const float *weights, ptrdiff_t n) {
    for (ptrdiff_t i = 0; weights && i < n; i++) {
        if (!isfinite(weights[i])) return BW_ERR_NONFINITE;
        if (weights[i] < 0) return BW_ERR_ARGUMENT;
    }
    return BW_OK;
}

/* A value that is not finite in column i of x makes h[i][i] not finite; a cross moment is checked whole. */
static bw_status check_sums(const job *j) {
    ptrdiff_t n = j->x->cols;
    double sum = 0;
    if (j->y)
        for (ptrdiff_t i = 0; i < n * j->y->cols; i++) sum += 0 * (double)j->h[i];
    else
        for (ptrdiff_t i = 0; i < n; i++) sum += 0 * (double)j->h[i * n + i];
    return isnan(sum) ? BW_ERR_NONFINITE : BW_OK;
}

bw_status bw_hessian_add(const bw_matrix *x, const bw_matrix *y, const float *weights, float *h) {
    job j = {.x = x, .y = y, .weights = weights, .h = h};
    bw_status status = bw_check_matrix(x);
    ptrdiff_t across = y ? y->cols : x->cols;
    if (!status && y) status = bw_check_matrix(y);
    if (!status && y && y->rows != x->rows) status = BW_ERR_SHAPE;
    if (!status) status = bw_check_shape(x->cols, across);
    if (!status && (x->cols > INT32_MAX || across > INT32_MAX)) status = BW_ERR_OVERFLOW; /* OpenBLAS counts in int */
    if (!status) status = check_weights(weights, x->rows);
    if (status || !x->rows || !x->cols || !across) return status;
    if (!h) return BW_ERR_ARGUMENT;
    ptrdiff_t tokens = x->rows < TOKENS ? x->rows : TOKENS;
    j.tiles_across = (across + TILE - 1) / TILE;
    int own_x = weights || !usable(x), own_y = y && (weights || !usable(y));
    j.x_scratch = own_x ? bw_alloc(tokens, x->cols * 4) : NULL;
    j.y_scratch = own_y ? bw_alloc(tokens, y->cols * 4) : NULL;
    if ((own_x && !j.x_scratch) || (own_y && !j.y_scratch)) status = BW_ERR_MEMORY;
    else status = add_blocks(&j);
    bw_free(j.x_scratch);
    bw_free(j.y_scratch);
    return status ? status : check_sums(&j);
}

bw_status bw_mirror_upper(ptrdiff_t n, float *h) {
    bw_status status = bw_check_shape(n, n);
    if (status) return status;
    if (n && !h) return BW_ERR_ARGUMENT;
    for (ptrdiff_t r = 0; r < n; r += 64) /* blocks, so that both halves stay in cache */
        for (ptrdiff_t c = 0; c <= r; c += 64)
            for (ptrdiff_t i = r; i < n && i < r + 64; i++)
                for (ptrdiff_t k = c; k < i && k < c + 64; k++) h[i * n + k] = h[k * n + i];
    return BW_OK;
}
