/* The two ways to multiply, chosen by matmul.c. */
#ifndef BW_MATMUL_H
#define BW_MATMUL_H

#include "bitween.h"

/* One product, arguments checked: out (m, rows) = x (m, cols) WT + bias, no dimension 0. */
typedef struct {
    const bw_matrix *x, *bias; /* bias NULL or (1, rows) */
    const bw_quantized *weight;
    bw_layout layout;
    bw_mode mode;
    bw_dtype dtype;
    char *out;
} bw_product;

/* Products with the same tokens, mode and dtype, at most BW_MOST_TOGETHER, in one parallel region. */
bw_status bw_multiply_few(const bw_product *products, int n);
bw_status bw_multiply_many(const bw_product *product);

static inline ptrdiff_t bw_least(ptrdiff_t a, ptrdiff_t b) {
    return a < b ? a : b;
}

/* Rows that one call of bw_finish_token takes at most. */
enum { BW_FINISH_ROWS = 64 };

/* Adds the bias to sums of rows row .. row+n-1 and stores them as token `token` of the output. */
void bw_finish_token(const bw_product *product, ptrdiff_t token, ptrdiff_t row, ptrdiff_t n, float *sums);

#endif
