/* Stored rows back to numbers. */
#include <stdatomic.h>

#include "alloc.h"
#include "parallel.h"
#include "rows.h"
#include "scheme.h"

#define CHUNK_VALUES 32768

typedef struct {
    const bw_quantized *tensor;
    bw_layout layout;
    const int64_t *ids; /* n_rows, or NULL for all rows in order */
    ptrdiff_t n_rows;
    bw_dtype dtype;
    char *out;
    char *scratch;
    ptrdiff_t scratch_bytes, rows_per_chunk;
    atomic_int status;
} decode_job;

static void decode_chunk(void *context, ptrdiff_t chunk, int worker) {
    decode_job *job = context;
    const bw_quantized *t = job->tensor;
    const bw_layout *l = &job->layout;
    const bw_isa *isa = bw_cpu();
    char *p = job->scratch + worker * job->scratch_bytes;
    float *zeros = (float *)p;
    uint8_t *bytes = (uint8_t *)(p + bw_aligned(l->n_groups * 4));
    ptrdiff_t size = job->dtype == BW_F32 ? 4 : 2;
    ptrdiff_t first = chunk * job->rows_per_chunk, end = first + job->rows_per_chunk;
    for (ptrdiff_t i = first; i < (end < job->n_rows ? end : job->n_rows); i++) {
        ptrdiff_t r = job->ids ? (ptrdiff_t)job->ids[i] : i, at = i * t->cols;
        bw_status status = bw_row_zeros(t, l, r, bytes, zeros);
        int largest = isa->unpack(t->codes + r * l->row_bytes, t->cols, t->scheme.levels, bytes);
        if (!status && largest >= t->scheme.levels) status = BW_ERR_CODE;
        if (status) {
            atomic_store(&job->status, status);
            return;
        }
        isa->decode_row(bytes, t->cols, l->group, t->scales + r * l->n_groups, zeros, job->dtype, job->out + at * size);
    }
}

static bw_status decode_rows(decode_job *job) {
    const bw_quantized *t = job->tensor;
    if (job->dtype != BW_F32 && job->dtype != BW_F16 && job->dtype != BW_BF16) return BW_ERR_ARGUMENT;
    if (!job->n_rows || !t->cols) return BW_OK;
    if (!job->out) return BW_ERR_ARGUMENT;
    job->rows_per_chunk = CHUNK_VALUES / t->cols + 1;
    ptrdiff_t n_chunks = (job->n_rows - 1) / job->rows_per_chunk + 1;
    int n_workers = bw_n_workers(n_chunks);
    job->scratch_bytes = bw_aligned(job->layout.n_groups * 4) + bw_aligned(t->cols + 16);
    job->scratch = bw_alloc(n_workers, job->scratch_bytes);
    if (!job->scratch) return BW_ERR_MEMORY;
    bw_status status = bw_parallel_for(n_workers, n_chunks, decode_chunk, job);
    bw_free(job->scratch);
    return status ? status : (bw_status)atomic_load(&job->status);
}

bw_status bw_dequantize(const bw_quantized *tensor, bw_dtype dtype, void *out) {
    decode_job job = {.tensor = tensor, .n_rows = tensor->rows, .dtype = dtype, .out = out};
    bw_status status = bw_check_quantized(tensor, &job.layout);
    return status ? status : decode_rows(&job);
}

bw_status bw_dequantize_rows(const bw_quantized *tensor, const int64_t *ids, ptrdiff_t n, bw_dtype dtype, void *out) {
    decode_job job = {.tensor = tensor, .ids = ids, .n_rows = n, .dtype = dtype, .out = out};
    bw_status status = bw_check_quantized(tensor, &job.layout);
    if (!status) status = bw_check_shape(n, tensor->cols);
    if (status) return status;
    if (n && !ids) return BW_ERR_ARGUMENT;
    for (ptrdiff_t i = 0; i < n; i++)
        if (ids[i] < 0 || ids[i] >= tensor->rows) return BW_ERR_INDEX;
    return decode_rows(&job);
}
