/* The frame of every row-wise quantizer. */
#include "rows.h"

#include <stdatomic.h>
#include <string.h>

#include "alloc.h"
#include "importance.h"
#include "parallel.h"
#include "scheme.h"

#define CHUNK_VALUES 32768 /* values in a chunk: enough work to pay for a hand-over, small enough to balance */

typedef struct {
    bw_row_job job;
    char *scratch;
    ptrdiff_t scratch_bytes; /* of one worker */
    ptrdiff_t rows_per_chunk;
    atomic_int status;
} frame;

static bw_row carve_row(const frame *f, int worker) {
    ptrdiff_t cols = f->job.out->cols, groups = f->job.layout.n_groups;
    char *p = f->scratch + worker * f->scratch_bytes;
    bw_row row = {0};
    p += bw_aligned(cols * 4);
    if (f->job.importance) row.importance = (float *)p, p += bw_aligned(cols * 4);
    row.zeros = (float *)p;
    row.scales = (uint16_t *)(p += bw_aligned(groups * 4));
    row.bytes = (uint8_t *)(p + bw_aligned(groups * 2));
    return row;
}

/* A row as fp32: in place where it is that already. */
static const float *row_values(const bw_matrix *m, ptrdiff_t row, float *scratch) {
    const char *data = m->data;
    if (m->dtype == BW_F32 && m->col_stride == 1 && (uintptr_t)data % 4 == 0)
        return (const float *)(data + row * m->row_stride * 4);
    bw_cpu()->load_row(m, row, 0, m->cols, scratch);
    return scratch;
}

static void write_row(const frame *f, bw_row *row) {
    const bw_quantized *out = f->job.out;
    const bw_layout *l = &f->job.layout;
    const bw_isa *isa = bw_cpu();
    isa->encode_row(row->values, out->cols, l->group, out->scheme.levels, row->scales, row->zeros, row->bytes);
    uint8_t *codes = out->codes + row->index * l->row_bytes;
    memset(codes + l->row_bytes - (l->row_bytes < 4 ? l->row_bytes : 4), 0,
           l->row_bytes < 4 ? (size_t)l->row_bytes : 4);
    isa->pack(row->bytes, out->cols, out->scheme.levels, codes);
    memcpy(out->scales + row->index * l->n_groups, row->scales, (size_t)l->n_groups * 2);
    if (out->scheme.symmetric) return;
    for (ptrdiff_t g = 0; g < l->n_groups; g++) row->bytes[g] = (uint8_t)row->zeros[g];
    bw_pack_zeros(row->bytes, l->n_groups, out->scheme.levels, out->zeros + row->index * l->row_zero_bytes);
}

static void quantize_chunk(void *context, ptrdiff_t chunk, int worker) {
    frame *f = context;
    bw_row row = carve_row(f, worker);
    float *scratch = (float *)(f->scratch + worker * f->scratch_bytes);
    ptrdiff_t first = chunk * f->rows_per_chunk, end = first + f->rows_per_chunk;
    if (end > f->job.out->rows) end = f->job.out->rows;
    for (row.index = first; row.index < end; row.index++) {
        if (atomic_load_explicit(&f->status, memory_order_relaxed)) return;
        row.values = row_values(f->job.weight, row.index, scratch);
        bw_status status = BW_OK;
        if (row.importance) status = bw_load_importance(f->job.importance, row.index, row.importance);
        if (!status) status = f->job.find_grid(&f->job, &row);
        if (status) {
            atomic_store(&f->status, status);
            return;
        }
        write_row(f, &row);
    }
}

bw_status bw_quantize_rows(const bw_matrix *weight, const bw_matrix *importance, const bw_quantized *out,
                           bw_grid_fn find_grid, void *context) {
    frame f = {.job = {weight, importance, out, {0}, find_grid, context}};
    bw_status status = bw_check_matrix(weight);
    if (!status) status = bw_check_importance(importance, weight);
    if (!status) status = bw_check_quantized(out, &f.job.layout);
    if (status) return status;
    if (weight->rows != out->rows || weight->cols != out->cols) return BW_ERR_SHAPE;
    if (!out->rows || !out->cols) return BW_OK;
    f.rows_per_chunk = CHUNK_VALUES / out->cols + 1;
    ptrdiff_t n_chunks = (out->rows + f.rows_per_chunk - 1) / f.rows_per_chunk;
    int n_workers = bw_n_workers(n_chunks);
    ptrdiff_t groups = f.job.layout.n_groups;
    f.scratch_bytes = (importance ? 2 : 1) * bw_aligned(out->cols * 4) + bw_aligned(groups * 4) +
                      bw_aligned(groups * 2) + bw_aligned(out->cols + 8);
    f.scratch = bw_alloc(n_workers, f.scratch_bytes);
    if (!f.scratch) return BW_ERR_MEMORY;
    status = bw_parallel_for(n_workers, n_chunks, quantize_chunk, &f);
    bw_free(f.scratch);
    return status ? status : (bw_status)atomic_load(&f.status);
}

/* All above zero and finite: fp16 patterns 1 .. 0x7bff. */
static bw_status check_scales(const uint16_t *scales, ptrdiff_t n) {
    int bad = 0;
    for (ptrdiff_t g = 0; g < n; g++) bad |= (uint16_t)(scales[g] - 1) >= 0x7bff;
    return bad ? BW_ERR_SCALE : BW_OK;
}

bw_status bw_row_zeros(const bw_quantized *t, const bw_layout *l, ptrdiff_t row, uint8_t *bytes, float *zeros) {
    bw_status status = check_scales(t->scales + row * l->n_groups, l->n_groups);
    if (status) return status;
    if (t->scheme.symmetric) {
        for (ptrdiff_t g = 0; g < l->n_groups; g++) zeros[g] = bw_symmetric_zero(t->scheme.levels);
        return BW_OK;
    }
    int largest = bw_unpack_zeros(t->zeros + row * l->row_zero_bytes, l->n_groups, t->scheme.levels, bytes);
    for (ptrdiff_t g = 0; g < l->n_groups; g++) zeros[g] = bytes[g];
    return largest < t->scheme.levels ? BW_OK : BW_ERR_CODE;
}
