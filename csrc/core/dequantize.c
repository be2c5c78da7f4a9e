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
    bw_dtype dtype;
    char *out;
    char *scratch;
    ptrdiff_t scratch_bytes, rows_per_chunk;
    atomic_int status;
} decode_job;

static ptrdiff_t aligned(ptrdiff_t bytes) {
    return (bytes + 63) / 64 * 64;
}

static void decode_chunk(void *context, ptrdiff_t chunk, int worker) {
    decode_job *job = context;
    const bw_quantized *t = job->tensor;
    const bw_layout *l = &job->layout;
    const bw_isa *isa = bw_cpu();
    char *p = job->scratch + worker * job->scratch_bytes;
    float *values = (float *)p, *zeros = (float *)(p + aligned(t->cols * 4));
    uint8_t *bytes = (uint8_t *)zeros + aligned(l->n_groups * 4);
    ptrdiff_t first = chunk * job->rows_per_chunk, end = first + job->rows_per_chunk;
    for (ptrdiff_t r = first; r < (end < t->rows ? end : t->rows); r++) {
        bw_status status = bw_row_zeros(t, l, r, bytes, zeros);
        int largest = isa->unpack(t->codes + r * l->row_bytes, t->cols, t->scheme.levels, bytes);
        if (status || largest >= t->scheme.levels) {
            atomic_store(&job->status, BW_ERR_CODE);
            return;
        }
        ptrdiff_t at = r * t->cols;
        float *row = job->dtype == BW_F32 ? (float *)job->out + at : values;
        isa->decode_row(bytes, t->cols, l->group, t->scales + r * l->n_groups, zeros, row);
        if (job->dtype != BW_F32) isa->store(values, t->cols, job->dtype, job->out + at * 2);
    }
}

bw_status bw_dequantize(const bw_quantized *tensor, bw_dtype dtype, void *out) {
    decode_job job = {.tensor = tensor, .dtype = dtype, .out = out};
    bw_status status = bw_check_quantized(tensor, &job.layout);
    if (status) return status;
    if (dtype != BW_F32 && dtype != BW_F16 && dtype != BW_BF16) return BW_ERR_ARGUMENT;
    if (!tensor->rows || !tensor->cols) return BW_OK;
    if (!out) return BW_ERR_ARGUMENT;
    job.rows_per_chunk = CHUNK_VALUES / tensor->cols + 1;
    ptrdiff_t n_chunks = (tensor->rows - 1) / job.rows_per_chunk + 1;
    int n_workers = bw_n_workers(n_chunks);
    job.scratch_bytes = aligned(tensor->cols * 4) + aligned(job.layout.n_groups * 4) + aligned(tensor->cols + 8);
    job.scratch = bw_alloc(n_workers, job.scratch_bytes);
    if (!job.scratch) return BW_ERR_MEMORY;
    bw_parallel_for(n_workers, n_chunks, decode_chunk, &job);
    bw_free(job.scratch);
    return (bw_status)atomic_load(&job.status);
}
