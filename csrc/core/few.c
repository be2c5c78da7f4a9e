/* What the kernels for few tokens need to know of a stored matrix. */
#include "few.h"

#include "alloc.h"
#include "cpu.h"
#include "matmul.h"
#include "scheme.h"

enum { BYTES_AHEAD = 4096 /* of codes: what the memory delivers in its latency, and some more */ };

/* How many of the first rows have `reach` bytes from their start on in an array of `rows` times `row_bytes`. */
static ptrdiff_t rows_with(ptrdiff_t reach, ptrdiff_t row_bytes, ptrdiff_t rows) {
    return rows * row_bytes < reach ? 0 : rows - (reach - 1) / row_bytes;
}

ptrdiff_t bw_describe_few(const bw_quantized *w, const bw_layout *l, bw_mode mode, bw_few *few) {
    int ternary = w->scheme.levels == 3, one_group = l->n_groups == 1;
    ptrdiff_t cols = w->cols;
    few->weight = w;
    few->layout = l;
    few->digits = (int)mode;
    few->bits = bw_level_bits(w->scheme.levels);
    few->order = ternary || !mode ? 0 : bw_cpu()->token_order(few->bits);
    few->zero = bw_symmetric_zero(w->scheme.levels);
    few->group_shift = one_group ? 62 : __builtin_ctzll((unsigned long long)l->group);
    few->cell_shift = few->group_shift < 6 ? few->group_shift : 6;
    few->n_units = (cols - 1) / BW_UNIT + 1;
    few->n_cells = ((cols - 1) >> few->cell_shift) + 1;
    /* Scales are read 16 at a time, zeros 64 bytes, codes by the unit: 64 bytes of a dense one; 16 bytes of each of the
     * five ternary ones that start within 64 bytes. */
    ptrdiff_t codes = ternary ? (few->n_units - 1) / 5 * 64 + 16 : (few->n_units - 1) * 8 * few->bits;
    few->reach = bw_aligned(codes + 64);
    few->scale_reach = bw_aligned((l->n_groups + 16) * 2);
    few->zero_reach = bw_aligned(l->row_zero_bytes + 64);
    few->direct_rows =
        bw_least(rows_with(few->reach, l->row_bytes, w->rows), rows_with(few->scale_reach, l->n_groups * 2, w->rows));
    if (!w->scheme.symmetric)
        few->direct_rows = bw_least(few->direct_rows, rows_with(few->zero_reach, l->row_zero_bytes, w->rows));
    few->rows_ahead = (BYTES_AHEAD / (BW_ROWS_AT_ONCE * l->row_bytes) + 1) * BW_ROWS_AT_ONCE;
    few->token_bytes = few->n_units * BW_UNIT * 4;
    if (few->digits) few->token_bytes = bw_aligned(few->n_units * BW_UNIT * 2 + bw_padded_cells(few->n_cells) * 8);
    for (int i = 0; i < 16; i++) {
        few->lanes[i] = (int32_t)((i / 4 * 16) >> few->cell_shift);
        few->units[i] = (int32_t)((ptrdiff_t)i * BW_UNIT >> few->group_shift);
    }
    /* Scales of the rows times those of the tokens, and copies of the rows. */
    return BW_ROWS_AT_ONCE * BW_TOKENS_AT_ONCE * (bw_padded_cells(few->n_cells) + 16) * 4 +
           BW_ROWS_AT_ONCE * (few->reach + few->scale_reach + few->zero_reach);
}
