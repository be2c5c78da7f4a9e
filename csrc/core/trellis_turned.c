/* Trellis matrices that are stored between two Hadamard transforms, as EXL3 has them:
 *
 *   W = diag(scale sign) H V H diag(sign) / 128
 *
 * with V the values of the codes, and H the 128 x 128 Hadamard matrix of Sylvester's order in each block of rows and of
 * columns. A weight far out is spread over its whole block before it is rounded, and so is its error. Values of codes
 * are whole numbers within 510, sums of 128 x 128 of them are exact in fp32: the same numbers on every instruction set.
 */
#include "trellis_turned.h"

#include <stdatomic.h>
#include <string.h>

#include "alloc.h"
#include "blas.h"
#include "codec/trellis.h"
#include "cpu.h"
#include "parallel.h"

enum { SIDE = BW_TRELLIS_SIDE, TILE = BW_TRELLIS_TILE, TURN = BW_TURN, TILES = TURN / SIDE, BLOCK_TOKENS = 512 };

bw_status bw_check_turned(const bw_trellis *t, const bw_trellis_layout *layout) {
    if (t->width != BW_TURNED_WIDTH) return BW_ERR_ARGUMENT;
    if (t->rows % TURN || t->cols % TURN) return BW_ERR_SHAPE;
    for (ptrdiff_t k = 1; k < layout->col_tiles; k++)
        if (t->rates[k] != t->rates[0]) return BW_ERR_CODE;
    return BW_OK;
}

/* Each column of x (128, stride) = H times it; `stride` is the number of columns. */
static void transform(float *x, ptrdiff_t stride) {
    for (int h = 1; h < TURN; h *= 2)
        for (int i = 0; i < TURN; i += 2 * h)
            for (int j = i; j < i + h; j++) {
                float *a = x + j * stride, *b = x + (j + h) * stride;
                for (ptrdiff_t k = 0; k < stride; k++) {
                    float sum = a[k] + b[k], difference = a[k] - b[k];
                    a[k] = sum;
                    b[k] = difference;
                }
            }
}

/* out (128 columns, 128 rows) = V of a block, not transformed; room: TILES * TILE numbers. */
static void decode_block(const bw_trellis *t, const bw_trellis_layout *l, ptrdiff_t row_block, ptrdiff_t col_block,
                         float *room, float *out) {
    static const float ones[SIDE] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
    const uint8_t *rates = t->rates + col_block * TILES;
    for (ptrdiff_t k = 0; k < TILES; k++) {
        ptrdiff_t row_tile = row_block * TILES + k;
        const uint8_t *codes = t->codes + row_tile * l->row_bytes + col_block * TILES * 2 * SIDE * rates[0];
        bw_cpu()->trellis_decode(codes, rates, TILES, t->width, codes == t->codes, ones, room, SIDE);
        for (ptrdiff_t i = 0; i < TILES * TILE; i++) {
            int at = (int)(i % TILE);
            out[(i / TILE * SIDE + bw_trellis_column(at, 1)) * TURN + k * SIDE + bw_trellis_row(at, 1)] = room[i];
        }
    }
}

/* What one unit of H V H is worth in each of 128 rows from `row` on. */
static bw_status load_turned_steps(const bw_trellis *t, ptrdiff_t row, float *steps) {
    bw_status status = bw_load_steps(t, row, TURN, steps);
    for (int r = 0; r < TURN; r++) steps[r] *= (float)bw_turn_sign(r) / TURN;
    return status;
}

typedef struct {
    const bw_trellis *tensor;
    const bw_trellis_layout *layout;
    ptrdiff_t first, n;
    bw_dtype dtype;
    char *out;
    const bw_matrix *bias;
    const float *x; /* products: (n, cols), transformed */
    char *scratch;
    ptrdiff_t scratch_bytes;
    atomic_int status;
} turned_job;

static void dequantize_block(void *context, ptrdiff_t chunk, int worker) {
    turned_job *job = context;
    const bw_trellis *t = job->tensor;
    float steps[TURN], *block = (float *)(job->scratch + worker * job->scratch_bytes), *rows = block + TURN * TURN;
    ptrdiff_t row_block = job->first / TURN + chunk, row = row_block * TURN, size = job->dtype == BW_F32 ? 4 : 2;
    if (load_turned_steps(t, row, steps)) {
        atomic_store(&job->status, BW_ERR_SCALE);
        return;
    }
    for (ptrdiff_t b = 0; b < t->cols / TURN; b++) {
        decode_block(t, job->layout, row_block, b, rows, block);
        transform(block, TURN);
        for (int r = 0; r < TURN; r++)
            for (int c = 0; c < TURN; c++) rows[r * TURN + c] = block[c * TURN + r];
        transform(rows, TURN);
        for (ptrdiff_t r = 0; r < TURN; r++) {
            ptrdiff_t at = row + r - job->first;
            if (at < 0 || at >= job->n) continue;
            for (int c = 0; c < TURN; c++) rows[r * TURN + c] *= steps[r] * (float)bw_turn_sign(c);
            bw_cpu()->store(rows + r * TURN, TURN, job->dtype, job->out + (at * t->cols + b * TURN) * size);
        }
    }
}

bw_status bw_turned_dequantize(const bw_trellis *tensor, const bw_trellis_layout *layout, ptrdiff_t first, ptrdiff_t n,
                               bw_dtype dtype, void *out) {
    turned_job job = {.tensor = tensor, .layout = layout, .first = first, .n = n, .dtype = dtype, .out = out};
    ptrdiff_t n_chunks = (first + n - 1) / TURN - first / TURN + 1;
    int n_workers = bw_n_workers(n_chunks);
    job.scratch_bytes = bw_aligned(2 * TURN * TURN * 4);
    job.scratch = bw_alloc(n_workers, job.scratch_bytes);
    if (!job.scratch) return BW_ERR_MEMORY;
    bw_status status = bw_parallel_for(n_workers, n_chunks, dequantize_block, &job);
    bw_free(job.scratch);
    return status ? status : (bw_status)atomic_load(&job.status);
}

/* All tokens times 128 rows, which are decoded once. */
static void multiply_block(void *context, ptrdiff_t chunk, int worker) {
    turned_job *job = context;
    const bw_trellis *t = job->tensor;
    float steps[TURN], bias[TURN], *tile = (float *)(job->scratch + worker * job->scratch_bytes),
                                   *sums = tile + t->cols * TURN, *room = sums + BLOCK_TOKENS * TURN;
    ptrdiff_t row = chunk * TURN, size = job->dtype == BW_F32 ? 4 : 2;
    if (load_turned_steps(t, row, steps)) {
        atomic_store(&job->status, BW_ERR_SCALE);
        return;
    }
    if (job->bias) bw_cpu()->load_row(job->bias, 0, row, TURN, bias);
    for (ptrdiff_t b = 0; b < t->cols / TURN; b++) decode_block(t, job->layout, chunk, b, room, tile + b * TURN * TURN);
    for (ptrdiff_t token = 0; token < job->n; token += BLOCK_TOKENS) {
        ptrdiff_t m = job->n - token < BLOCK_TOKENS ? job->n - token : BLOCK_TOKENS;
        bw_sgemm(0, 0, m, TURN, t->cols, 1, job->x + token * t->cols, t->cols, tile, TURN, 0, sums, TURN);
        for (ptrdiff_t i = 0; i < m; i++) {
            float *own = sums + i * TURN;
            transform(own, 1);
            for (int r = 0; r < TURN; r++) own[r] = own[r] * steps[r] + (job->bias ? bias[r] : 0);
            bw_cpu()->store(own, TURN, job->dtype, job->out + ((token + i) * t->rows + row) * size);
        }
    }
}

bw_status bw_turned_matmul(const bw_matrix *x, const bw_trellis *weight, const bw_trellis_layout *layout,
                           const bw_matrix *bias, bw_dtype dtype, void *out) {
    turned_job job = {.tensor = weight, .layout = layout, .n = x->rows, .dtype = dtype, .out = out, .bias = bias};
    ptrdiff_t n_chunks = weight->rows / TURN;
    int n_workers = bw_n_workers(n_chunks);
    job.scratch_bytes = bw_aligned((weight->cols * TURN + BLOCK_TOKENS * TURN + TILES * TILE) * 4);
    job.scratch = bw_alloc(n_workers, job.scratch_bytes);
    float *inputs = bw_alloc(x->rows, x->cols * 4);
    bw_status status = BW_ERR_MEMORY;
    if (job.scratch && inputs) {
        for (ptrdiff_t i = 0; i < x->rows; i++) {
            float *own = inputs + i * x->cols;
            bw_cpu()->load_row(x, i, 0, x->cols, own);
            for (ptrdiff_t c = 0; c < x->cols; c++) own[c] *= (float)bw_turn_sign(c % TURN);
            for (ptrdiff_t c = 0; c < x->cols; c += TURN) transform(own + c, 1);
        }
        job.x = inputs;
        status = bw_parallel_for(n_workers, n_chunks, multiply_block, &job);
    }
    bw_free(job.scratch);
    bw_free(inputs);
    return status ? status : (bw_status)atomic_load(&job.status);
}
