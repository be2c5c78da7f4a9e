/* Losses of each token from its logits, in blocks that stay in the first cache: no array of the vocabulary's size.
 * A row is read twice, for its largest logit and for the sums; the second time it comes from the cache. */
#include <math.h>

#include "cpu.h"
#include "parallel.h"
#include "scheme.h"

enum { BLOCK = 1024, CHUNK_VALUES = 32768 };

typedef struct {
    const bw_matrix *logits, *reference;
    const int64_t *targets;
    float *out; /* a number a row */
    ptrdiff_t rows_per_chunk;
} loss_job;

/* Columns first .. of a row as fp32, padded to whole vectors with -infinity; returns how many numbers that makes. */
static ptrdiff_t load_block(const bw_matrix *m, ptrdiff_t row, ptrdiff_t first, float *block) {
    ptrdiff_t n = m->cols - first < BLOCK ? m->cols - first : BLOCK, padded = (n + 15) / 16 * 16;
    bw_cpu()->load_row(m, row, first, n, block);
    for (ptrdiff_t i = n; i < padded; i++) block[i] = -INFINITY;
    return padded;
}

static float row_max(const bw_matrix *m, ptrdiff_t row, float *block) {
    float largest = -INFINITY;
    for (ptrdiff_t first = 0; first < m->cols; first += BLOCK) {
        float x = bw_cpu()->block_max(block, load_block(m, row, first, block));
        largest = x > largest ? x : largest;
    }
    return largest;
}

static float row_nll(const loss_job *job, ptrdiff_t row) {
    const bw_matrix *m = job->logits;
    float block[BLOCK], target, max = row_max(m, row, block);
    double sum = 0;
    if (!isfinite(max)) return NAN;
    for (ptrdiff_t first = 0; first < m->cols; first += BLOCK)
        sum += bw_cpu()->block_exp(block, load_block(m, row, first, block), max);
    bw_cpu()->load_row(m, row, (ptrdiff_t)job->targets[row], 1, &target);
    return (float)(log(sum) - ((double)target - max));
}

static float row_kl(const loss_job *job, ptrdiff_t row) {
    float a[BLOCK], b[BLOCK];
    float a_max = row_max(job->reference, row, a), b_max = row_max(job->logits, row, b);
    double sums[3] = {0};
    if (!isfinite(a_max) || !isfinite(b_max)) return NAN;
    for (ptrdiff_t first = 0; first < job->logits->cols; first += BLOCK) {
        load_block(job->reference, row, first, a);
        bw_cpu()->block_kl(a, b, load_block(job->logits, row, first, b), a_max, b_max, sums);
    }
    double kl = sums[2] / sums[0] - log(sums[0]) + log(sums[1]);
    return kl < 0 ? 0 : (float)kl; /* below zero by rounding only */
}

static void loss_chunk(void *context, ptrdiff_t chunk, int worker) {
    (void)worker;
    const loss_job *job = context;
    ptrdiff_t first = chunk * job->rows_per_chunk, end = first + job->rows_per_chunk;
    if (end > job->logits->rows) end = job->logits->rows;
    for (ptrdiff_t r = first; r < end; r++) job->out[r] = job->targets ? row_nll(job, r) : row_kl(job, r);
}

static bw_status run(loss_job *job) {
    if (!job->logits->rows) return BW_OK;
    if (!job->logits->cols) return BW_ERR_SHAPE;
    if (!job->out) return BW_ERR_ARGUMENT;
    job->rows_per_chunk = CHUNK_VALUES / job->logits->cols + 1;
    ptrdiff_t n_chunks = (job->logits->rows - 1) / job->rows_per_chunk + 1;
    return bw_parallel_for(bw_n_workers(n_chunks), n_chunks, loss_chunk, job);
}

bw_status bw_cross_entropy(const bw_matrix *logits, const int64_t *targets, float *out) {
    loss_job job = {.logits = logits, .targets = targets, .out = out};
    bw_status status = bw_check_matrix(logits);
    if (status) return status;
    if (logits->rows && !targets) return BW_ERR_ARGUMENT;
    for (ptrdiff_t r = 0; r < logits->rows; r++)
        if (targets[r] < 0 || targets[r] >= logits->cols) return BW_ERR_INDEX;
    return run(&job);
}

bw_status bw_kl_divergence(const bw_matrix *reference, const bw_matrix *logits, float *out) {
    loss_job job = {.logits = logits, .reference = reference, .out = out};
    bw_status status = bw_check_matrix(reference);
    if (!status) status = bw_check_matrix(logits);
    if (status) return status;
    if (reference->rows != logits->rows || reference->cols != logits->cols) return BW_ERR_SHAPE;
    return run(&job);
}

bw_status bw_total(const bw_matrix *x, double *out) {
    float block[BLOCK];
    double lanes[8] = {0};
    bw_status status = bw_check_matrix(x);
    if (status) return status;
    ptrdiff_t rows = x->cols ? x->rows : 0; /* nothing has any number of rows, and they are not walked */
    for (ptrdiff_t r = 0; r < rows; r++)
        for (ptrdiff_t first = 0; first < x->cols; first += BLOCK) {
            ptrdiff_t n = x->cols - first < BLOCK ? x->cols - first : BLOCK, i = 0;
            bw_cpu()->load_row(x, r, first, n, block);
            for (; i + 8 <= n; i += 8)
                for (int j = 0; j < 8; j++) lanes[j] += block[i + j];
            for (; i < n; i++) lanes[i % 8] += block[i];
        }
    *out = ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
    return BW_OK;
}
