/* Products with a stored matrix: out = x WT + bias.
 *
 * Rows of W are unpacked into fp32 tiles that stay in the cache, and each tile is multiplied at once; the whole
 * matrix never exists as numbers. */
#include <stdatomic.h>
#include <string.h>

#include "alloc.h"
#include "blas.h"
#include "cpu.h"
#include "parallel.h"
#include "rows.h"
#include "scheme.h"

/* A tile of 64 x 640 numbers takes 160 KiB. 640 columns hold whole groups (up to 128) and whole bytes of every
 * coding (ternary: 5 codes a byte), so each tile starts at a byte and, unless a group spans the row, at a group. */
enum { TILE_ROWS = 64, TILE_COLS = 640, BLOCK_TOKENS = 512 };

typedef struct {
    const bw_quantized *weight;
    bw_layout layout;
    const float *x; /* (m, cols) */
    const float *bias; /* (rows), zeros when there is none */
    ptrdiff_t m, x_stride;
    bw_dtype dtype;
    char *out;
    char *scratch;
    ptrdiff_t scratch_bytes, n_row_blocks;
    atomic_int status;
} tile_job;

/* What one worker needs. */
typedef struct {
    float *tile;    /* TILE_ROWS x TILE_COLS */
    float *sums;    /* BLOCK_TOKENS x TILE_ROWS */
    float *zeros;   /* TILE_ROWS x n_groups */
    uint8_t *bytes; /* max(TILE_COLS, n_groups) + 8 */
} tile_scratch;

static ptrdiff_t least(ptrdiff_t a, ptrdiff_t b) {
    return a < b ? a : b;
}

static ptrdiff_t tile_scratch_bytes(ptrdiff_t n_groups) {
    ptrdiff_t values = (TILE_ROWS * TILE_COLS + BLOCK_TOKENS * TILE_ROWS) * (ptrdiff_t)sizeof(float);
    return values + bw_aligned(TILE_ROWS * n_groups * 4) + bw_aligned(n_groups + TILE_COLS + 8);
}

static tile_scratch carve(const tile_job *job, int worker) {
    tile_scratch s = {.tile = (float *)(job->scratch + worker * job->scratch_bytes)};
    s.sums = s.tile + TILE_ROWS * TILE_COLS;
    s.zeros = s.sums + BLOCK_TOKENS * TILE_ROWS;
    s.bytes = (uint8_t *)s.zeros + bw_aligned(TILE_ROWS * job->layout.n_groups * 4);
    return s;
}

/* Columns first .. first+n-1 of one row as numbers. */
static bw_status decode_part(const tile_job *job, ptrdiff_t row, ptrdiff_t first, ptrdiff_t n, const float *zeros,
                             uint8_t *bytes, float *out) {
    const bw_quantized *w = job->weight;
    const bw_layout *l = &job->layout;
    ptrdiff_t at = w->scheme.levels == 3 ? first / 5 : first / 8 * bw_level_bits(w->scheme.levels), g = first / l->group;
    int largest = bw_cpu()->unpack(w->codes + row * l->row_bytes + at, n, w->scheme.levels, bytes);
    bw_cpu()->decode_row(bytes, n, l->group, w->scales + row * l->n_groups + g, zeros + g, out);
    return largest < w->scheme.levels ? BW_OK : BW_ERR_CODE;
}

/* sums (m, n) = x[:, all columns] times n rows of W from `row` on. */
static bw_status multiply_rows(const tile_job *job, const tile_scratch *s, const float *x, ptrdiff_t m, ptrdiff_t row,
                               ptrdiff_t n) {
    const bw_layout *l = &job->layout;
    ptrdiff_t cols = job->weight->cols;
    bw_status status;
    if (!cols) memset(s->sums, 0, (size_t)(m * TILE_ROWS) * sizeof(float));
    for (ptrdiff_t r = 0; r < n; r++)
        if ((status = bw_row_zeros(job->weight, l, row + r, s->bytes, s->zeros + r * l->n_groups))) return status;
    for (ptrdiff_t first = 0; first < cols; first += TILE_COLS) {
        ptrdiff_t width = least(cols - first, TILE_COLS);
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
    tile_scratch s = carve(job, worker);
    ptrdiff_t rows = job->weight->rows, size = job->dtype == BW_F32 ? 4 : 2;
    ptrdiff_t token = chunk / job->n_row_blocks * BLOCK_TOKENS, row = chunk % job->n_row_blocks * TILE_ROWS;
    ptrdiff_t m = least(job->m - token, BLOCK_TOKENS), n = least(rows - row, TILE_ROWS);
    bw_status status = multiply_rows(job, &s, job->x + token * job->x_stride, m, row, n);
    if (status) {
        atomic_store(&job->status, status);
        return;
    }
    for (ptrdiff_t i = 0; i < m; i++) {
        float *sums = s.sums + i * TILE_ROWS;
        for (ptrdiff_t r = 0; r < n; r++) sums[r] += job->bias[row + r];
        bw_cpu()->store(sums, n, job->dtype, job->out + ((token + i) * rows + row) * size);
    }
}

/* x as fp32 with unit column stride: itself, or converted into `room` (m, cols). */
static void take_activations(tile_job *job, const bw_matrix *x, float *room) {
    job->x = room ? room : x->data;
    job->x_stride = room || x->rows == 1 ? x->cols : x->row_stride;
    for (ptrdiff_t i = 0; room && i < x->rows; i++) bw_cpu()->load_row(x, i, 0, x->cols, room + i * x->cols);
}

static int usable_as_is(const bw_matrix *x) {
    int rows_fit = x->rows == 1 || (x->row_stride >= x->cols && x->row_stride <= INT32_MAX);
    return x->dtype == BW_F32 && x->col_stride == 1 && rows_fit && (uintptr_t)x->data % 4 == 0;
}

static bw_status check(const bw_matrix *x, const bw_quantized *weight, const bw_matrix *bias, bw_dtype dtype,
                       const void *out, bw_layout *layout) {
    bw_status status = bw_check_matrix(x);
    if (!status) status = bw_check_quantized(weight, layout);
    if (!status && bias) status = bw_check_matrix(bias);
    if (status) return status;
    if (dtype != BW_F32 && dtype != BW_F16 && dtype != BW_BF16) return BW_ERR_ARGUMENT;
    if (x->cols != weight->cols || (bias && (bias->rows != 1 || bias->cols != weight->rows))) return BW_ERR_SHAPE;
    status = bw_check_shape(x->rows, weight->rows);
    if (status) return status;
    return x->rows && weight->rows && !out ? BW_ERR_ARGUMENT : BW_OK;
}

bw_status bw_matmul(const bw_matrix *x, const bw_quantized *weight, const bw_matrix *bias, bw_dtype dtype, void *out) {
    tile_job job = {.weight = weight, .m = x->rows, .dtype = dtype, .out = out};
    bw_status status = check(x, weight, bias, dtype, out, &job.layout);
    if (status || !x->rows || !weight->rows) return status;
    job.n_row_blocks = (weight->rows - 1) / TILE_ROWS + 1;
    job.scratch_bytes = tile_scratch_bytes(job.layout.n_groups);
    ptrdiff_t n_chunks = ((x->rows - 1) / BLOCK_TOKENS + 1) * job.n_row_blocks;
    int n_workers = bw_n_workers(n_chunks);
    job.scratch = bw_alloc(n_workers, job.scratch_bytes);
    float *bias32 = bw_alloc(weight->rows, 4);
    float *x32 = usable_as_is(x) ? NULL : bw_alloc(x->rows, x->cols * 4);
    if (job.scratch && bias32 && (x32 || usable_as_is(x))) {
        take_activations(&job, x, x32);
        memset(bias32, 0, (size_t)weight->rows * 4);
        if (bias) bw_cpu()->load_row(bias, 0, 0, weight->rows, bias32);
        job.bias = bias32;
        bw_parallel_for(n_workers, n_chunks, multiply_chunk, &job);
        status = (bw_status)atomic_load(&job.status);
    } else status = BW_ERR_MEMORY;
    bw_free(job.scratch);
    bw_free(bias32);
    bw_free(x32);
    return status;
}
