/* Products with many tokens: rows of W are unpacked into fp32 tiles that stay in the cache, and each tile is
 * multiplied at once; the whole matrix never exists as numbers. */
#include <stdatomic.h>
#include <string.h>

#include "alloc.h"
#include "blas.h"
#include "cpu.h"
#include "matmul.h"
#include "parallel.h"
#include "rows.h"
#include "scheme.h"

/* A tile of 64 x 640 numbers takes 160 KiB. 640 columns hold whole groups (up to 128) and whole bytes of every
 * coding (ternary: 5 codes a byte), so each tile starts at a byte and, unless a group spans the row, at a group. */
enum { TILE_ROWS = 64, TILE_COLS = 640, BLOCK_TOKENS = 512 };

typedef struct {
    const bw_product *product;
    const float *x; /* (m, cols), rows x_stride apart */
    ptrdiff_t x_stride;
    char *scratch;
    ptrdiff_t scratch_bytes, n_row_blocks;
    atomic_int status;
} tile_job;

/* What one worker needs. */
typedef struct {
    float *tile;    /* TILE_ROWS x TILE_COLS */
    float *sums;    /* BLOCK_TOKENS x TILE_ROWS */
    float *zeros;   /* TILE_ROWS x n_groups */
    uint8_t *bytes; /* max(TILE_COLS, n_groups) + 16 */
} tile_scratch;

static ptrdiff_t tile_scratch_bytes(ptrdiff_t n_groups) {
    ptrdiff_t values = (TILE_ROWS * TILE_COLS + BLOCK_TOKENS * TILE_ROWS) * (ptrdiff_t)sizeof(float);
    return values + bw_aligned(TILE_ROWS * n_groups * 4) + bw_aligned(n_groups + TILE_COLS + 16);
}

static tile_scratch carve(const tile_job *job, int worker) {
    tile_scratch s = {.tile = (float *)(job->scratch + worker * job->scratch_bytes)};
    s.sums = s.tile + TILE_ROWS * TILE_COLS;
    s.zeros = s.sums + BLOCK_TOKENS * TILE_ROWS;
    s.bytes = (uint8_t *)s.zeros + bw_aligned(TILE_ROWS * job->product->layout.n_groups * 4);
    return s;
}

/* Columns first .. first+n-1 of one row as numbers. */
static bw_status decode_part(const tile_job *job, ptrdiff_t row, ptrdiff_t first, ptrdiff_t n, const float *zeros,
                             uint8_t *bytes, float *out) {
    const bw_quantized *w = job->product->weight;
    const bw_layout *l = &job->product->layout;
    ptrdiff_t at = w->scheme.levels == 3 ? first / 5 : first / 8 * bw_level_bits(w->scheme.levels),
              g = first / l->group;
    int largest = bw_cpu()->unpack(w->codes + row * l->row_bytes + at, n, w->scheme.levels, bytes);
    bw_cpu()->decode_row(bytes, n, l->group, w->scales + row * l->n_groups + g, zeros + g, BW_F32, out);
    return largest < w->scheme.levels ? BW_OK : BW_ERR_CODE;
}

/* sums (m, n) = x[:, all columns] times n rows of W from `row` on. */
static bw_status multiply_rows(const tile_job *job, const tile_scratch *s, const float *x, ptrdiff_t m, ptrdiff_t row,
                               ptrdiff_t n) {
    const bw_layout *l = &job->product->layout;
    ptrdiff_t cols = job->product->weight->cols;
    bw_status status;
    for (ptrdiff_t r = 0; r < n; r++)
        if ((status = bw_row_zeros(job->product->weight, l, row + r, s->bytes, s->zeros + r * l->n_groups)))
            return status;
    for (ptrdiff_t first = 0; first < cols; first += TILE_COLS) {
        ptrdiff_t width = bw_least(cols - first, TILE_COLS);
        for (ptrdiff_t r = 0; r < n; r++)
            if (decode_part(job, row + r, first, width, s->zeros + r * l->n_groups, s->bytes, s->tile + r * TILE_COLS))
                return BW_ERR_CODE;
        bw_sgemm(0, 1, m, n, width, 1.0f, x + first, job->x_stride, s->tile, TILE_COLS, first ? 1.0f : 0.0f, s->sums,
                 TILE_ROWS);
    }
    return BW_OK;
}

static void multiply_chunk(void *context, ptrdiff_t chunk, int worker) {
    tile_job *job = context;
    const bw_product *p = job->product;
    tile_scratch s = carve(job, worker);
    ptrdiff_t token = chunk / job->n_row_blocks * BLOCK_TOKENS, row = chunk % job->n_row_blocks * TILE_ROWS;
    ptrdiff_t m = bw_least(p->x->rows - token, BLOCK_TOKENS), n = bw_least(p->weight->rows - row, TILE_ROWS);
    bw_status status = multiply_rows(job, &s, job->x + token * job->x_stride, m, row, n);
    if (status) {
        atomic_store(&job->status, status);
        return;
    }
    for (ptrdiff_t i = 0; i < m; i++) bw_finish_token(p, token + i, row, n, s.sums + i * TILE_ROWS);
}

/* x as fp32 with unit column stride: itself, or converted into `room` (m, cols). */
static void take_activations(tile_job *job, float *room) {
    const bw_matrix *x = job->product->x;
    job->x = room ? room : x->data;
    job->x_stride = room || x->rows == 1 ? x->cols : x->row_stride;
    for (ptrdiff_t i = 0; room && i < x->rows; i++) bw_cpu()->load_row(x, i, 0, x->cols, room + i * x->cols);
}

static int usable_as_is(const bw_matrix *x) {
    int rows_fit = x->rows == 1 || (x->row_stride >= x->cols && x->row_stride <= INT32_MAX);
    return x->dtype == BW_F32 && x->col_stride == 1 && rows_fit && (uintptr_t)x->data % 4 == 0;
}

bw_status bw_multiply_many(const bw_product *product) {
    tile_job job = {.product = product};
    const bw_matrix *x = product->x;
    job.n_row_blocks = (product->weight->rows - 1) / TILE_ROWS + 1;
    job.scratch_bytes = tile_scratch_bytes(product->layout.n_groups);
    ptrdiff_t n_chunks = ((x->rows - 1) / BLOCK_TOKENS + 1) * job.n_row_blocks;
    int n_workers = bw_n_workers(n_chunks);
    job.scratch = bw_alloc(n_workers, job.scratch_bytes);
    float *room = usable_as_is(x) ? NULL : bw_alloc(x->rows, x->cols * 4);
    bw_status status = BW_ERR_MEMORY;
    if (job.scratch && (room || usable_as_is(x))) {
        take_activations(&job, room);
        status = bw_parallel_for(n_workers, n_chunks, multiply_chunk, &job);
        if (!status) status = (bw_status)atomic_load(&job.status);
    }
    bw_free(job.scratch);
    bw_free(room);
    return status;
}
