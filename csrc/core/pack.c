/* Codes, one byte each <-> packed rows. */
#include "pack.h"

#include <stdatomic.h>
#include <string.h>

#include "cpu.h"
#include "parallel.h"
#include "scheme.h"

#define CHUNK_CODES 65536

typedef struct {
    const uint8_t *from;
    uint8_t *to;
    ptrdiff_t rows, cols, row_bytes, rows_per_chunk;
    int32_t levels;
    atomic_int status;
} pack_job;

static ptrdiff_t chunk_end(const pack_job *job, ptrdiff_t chunk) {
    ptrdiff_t end = (chunk + 1) * job->rows_per_chunk;
    return end < job->rows ? end : job->rows;
}

static void pack_chunk(void *context, ptrdiff_t chunk, int worker) {
    (void)worker;
    pack_job *job = context;
    for (ptrdiff_t r = chunk * job->rows_per_chunk; r < chunk_end(job, chunk); r++) {
        const uint8_t *codes = job->from + r * job->cols;
        uint8_t *packed = job->to + r * job->row_bytes;
        uint8_t largest = 0; /* not an int: sixteen are compared at once */
        for (ptrdiff_t i = 0; i < job->cols; i++) largest = codes[i] > largest ? codes[i] : largest;
        if (largest >= job->levels) {
            atomic_store(&job->status, BW_ERR_CODE);
            return;
        }
        memset(packed + job->row_bytes - 4, 0, 4);
        bw_cpu()->pack(codes, job->cols, job->levels, packed);
    }
}

static void unpack_chunk(void *context, ptrdiff_t chunk, int worker) {
    (void)worker;
    pack_job *job = context;
    for (ptrdiff_t r = chunk * job->rows_per_chunk; r < chunk_end(job, chunk); r++) {
        int largest = bw_cpu()->unpack(job->from + r * job->row_bytes, job->cols, job->levels, job->to + r * job->cols);
        if (largest >= job->levels) atomic_store(&job->status, BW_ERR_CODE);
    }
}

static bw_status run(pack_job *job, bw_chunk_fn fn) {
    bw_scheme scheme = {job->levels, 1, -1};
    bw_status status = bw_check_scheme(&scheme);
    if (status) return status;
    status = bw_check_shape(job->rows, job->cols);
    if (status) return status;
    if (bw_row_bytes(job->cols, job->levels, &job->row_bytes)) return BW_ERR_OVERFLOW;
    if (!job->rows || !job->cols) return BW_OK;
    if (!job->from || !job->to) return BW_ERR_ARGUMENT;
    job->rows_per_chunk = CHUNK_CODES / job->cols + 1;
    ptrdiff_t n_chunks = (job->rows - 1) / job->rows_per_chunk + 1;
    status = bw_parallel_for(bw_n_workers(n_chunks), n_chunks, fn, job);
    return status ? status : (bw_status)atomic_load(&job->status);
}

bw_status bw_pack(const uint8_t *codes, ptrdiff_t rows, ptrdiff_t cols, int32_t levels, uint8_t *packed) {
    pack_job job = {.from = codes, .to = packed, .rows = rows, .cols = cols, .levels = levels};
    return run(&job, pack_chunk);
}

bw_status bw_unpack(const uint8_t *packed, ptrdiff_t rows, ptrdiff_t cols, int32_t levels, uint8_t *codes) {
    pack_job job = {.from = packed, .to = codes, .rows = rows, .cols = cols, .levels = levels};
    return run(&job, unpack_chunk);
}

/* Dense levels of the same width; the ternary coding is for codes only. */
static int32_t zero_levels(int32_t levels) {
    return 1 << bw_level_bits(levels);
}

void bw_pack_zeros(const uint8_t *zeros, ptrdiff_t n, int32_t levels, uint8_t *packed) {
    bw_cpu()->pack(zeros, n, zero_levels(levels), packed);
}

int bw_unpack_zeros(const uint8_t *packed, ptrdiff_t n, int32_t levels, uint8_t *zeros) {
    bw_cpu()->unpack(packed, n, zero_levels(levels), zeros);
    int largest = 0;
    for (ptrdiff_t i = 0; i < n; i++) largest = zeros[i] > largest ? zeros[i] : largest;
    return largest;
}
