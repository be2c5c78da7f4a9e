/* All arithmetic about storage: which schemes exist, and exact, overflow-checked sizes. */
#include "scheme.h"

const int32_t bw_all_levels[BW_N_LEVELS] = {2, 3, 4, 8, 16, 32, 64, 256};
static const int64_t all_groups[] = {16, 32, 64, 128, -1};

bw_status bw_check_scheme(const bw_scheme *scheme) {
    int known = 0;
    for (int i = 0; i < BW_N_LEVELS; i++) known |= scheme->levels == bw_all_levels[i];
    if (!known) return BW_ERR_ARGUMENT;
    for (size_t i = 0; i < sizeof all_groups / sizeof *all_groups; i++)
        if (scheme->group_size == all_groups[i]) return BW_OK;
    return BW_ERR_ARGUMENT;
}

float bw_symmetric_zero(int32_t levels) {
    return levels == 2 ? 0.5f : (float)(levels / 2);
}

int bw_level_bits(int32_t levels) {
    int bits = 0;
    while ((1 << bits) < levels) bits++;
    return bits;
}

bw_status bw_multiply(ptrdiff_t a, ptrdiff_t b, ptrdiff_t *product) {
    return a < 0 || b < 0 || __builtin_mul_overflow(a, b, product) ? BW_ERR_OVERFLOW : BW_OK;
}

bw_status bw_check_shape(ptrdiff_t rows, ptrdiff_t cols) {
    ptrdiff_t n;
    if (rows < 0 || cols < 0) return BW_ERR_SHAPE;
    if (rows > BW_MOST_VALUES || cols > BW_MOST_VALUES) return BW_ERR_OVERFLOW;
    return bw_multiply(rows, cols, &n) || n > BW_MOST_VALUES ? BW_ERR_OVERFLOW : BW_OK;
}

static bw_status add(ptrdiff_t a, ptrdiff_t b, ptrdiff_t *sum) {
    return __builtin_add_overflow(a, b, sum) ? BW_ERR_OVERFLOW : BW_OK;
}

/* Bytes that `n` codes take, padded to `unit` bytes. */
static bw_status code_bytes(ptrdiff_t n, int32_t levels, int packed_ternary, ptrdiff_t unit, ptrdiff_t *bytes) {
    ptrdiff_t total;
    if (packed_ternary && levels == 3) {
        if (add(n, 4, &total)) return BW_ERR_OVERFLOW;
        total /= 5;
    } else {
        if (bw_multiply(n, bw_level_bits(levels), &total) || add(total, 7, &total)) return BW_ERR_OVERFLOW;
        total /= 8;
    }
    if (add(total, unit - 1, &total)) return BW_ERR_OVERFLOW;
    *bytes = total / unit * unit;
    return BW_OK;
}

bw_status bw_row_bytes(ptrdiff_t cols, int32_t levels, ptrdiff_t *bytes) {
    return cols < 0 ? BW_ERR_ARGUMENT : code_bytes(cols, levels, 1, 4, bytes);
}

bw_status bw_scheme_layout(const bw_scheme *scheme, ptrdiff_t rows, ptrdiff_t cols, bw_layout *layout) {
    bw_status status = bw_check_scheme(scheme);
    if (status) return status;
    status = bw_check_shape(rows, cols);
    if (status) return status;
    bw_layout l = {0};
    l.group = scheme->group_size < 0 ? (cols ? cols : 1) : (ptrdiff_t)scheme->group_size;
    l.n_groups = cols / l.group + (cols % l.group != 0);
    if (bw_row_bytes(cols, scheme->levels, &l.row_bytes)) return BW_ERR_OVERFLOW;
    if (!scheme->symmetric && code_bytes(l.n_groups, scheme->levels, 0, 1, &l.row_zero_bytes)) return BW_ERR_OVERFLOW;
    ptrdiff_t row;
    if (bw_multiply(l.n_groups, 2, &row) || add(row, l.row_bytes, &row) || add(row, l.row_zero_bytes, &row) ||
        bw_multiply(row, rows, &l.n_bytes))
        return BW_ERR_OVERFLOW;
    *layout = l;
    return BW_OK;
}

/* Does the way from the first of n elements to the last fit, with room for the other dimension and for bytes? */
static int reachable(ptrdiff_t n, ptrdiff_t stride) {
    ptrdiff_t reach;
    return !__builtin_mul_overflow(n - 1, stride, &reach) && reach < PTRDIFF_MAX / 16 && reach > -PTRDIFF_MAX / 16;
}

bw_status bw_check_matrix(const bw_matrix *m) {
    bw_status status = bw_check_shape(m->rows, m->cols);
    if (status) return status;
    if (m->dtype != BW_F32 && m->dtype != BW_F16 && m->dtype != BW_BF16) return BW_ERR_ARGUMENT;
    if (!m->rows || !m->cols) return BW_OK;
    if (!reachable(m->rows, m->row_stride) || !reachable(m->cols, m->col_stride)) return BW_ERR_OVERFLOW;
    return m->data ? BW_OK : BW_ERR_ARGUMENT;
}

bw_status bw_check_quantized(const bw_quantized *t, bw_layout *layout) {
    bw_status status = bw_scheme_layout(&t->scheme, t->rows, t->cols, layout);
    if (status) return status;
    if (!layout->n_bytes) return BW_OK;
    if (!t->codes || !t->scales || (!t->scheme.symmetric && !t->zeros)) return BW_ERR_ARGUMENT;
    return BW_OK;
}
