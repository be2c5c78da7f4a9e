/* Products with a stored matrix: out = x WT + bias. */
#include "matmul.h"

#include <string.h>

#include "cpu.h"
#include "scheme.h"

static bw_status check(bw_product *p) {
    bw_status status = bw_check_matrix(p->x);
    if (!status) status = bw_check_quantized(p->weight, &p->layout);
    if (!status && p->bias) status = bw_check_matrix(p->bias);
    if (status) return status;
    if (p->dtype != BW_F32 && p->dtype != BW_F16 && p->dtype != BW_BF16) return BW_ERR_ARGUMENT;
    if (p->mode != BW_EXACT && p->mode != BW_INT8 && p->mode != BW_INT16) return BW_ERR_ARGUMENT;
    if (p->x->cols != p->weight->cols) return BW_ERR_SHAPE;
    if (p->bias && (p->bias->rows != 1 || p->bias->cols != p->weight->rows)) return BW_ERR_SHAPE;
    ptrdiff_t n;
    if (bw_multiply(p->x->rows, p->weight->rows, &n) || bw_multiply(n, 8, &n)) return BW_ERR_OVERFLOW;
    return n && !p->out ? BW_ERR_ARGUMENT : BW_OK;
}

/* The sum over no columns. */
static void store_bias(const bw_product *p) {
    for (ptrdiff_t t = 0; t < p->x->rows; t++)
        for (ptrdiff_t row = 0; row < p->weight->rows; row += BW_FINISH_ROWS) {
            float sums[BW_FINISH_ROWS] = {0};
            ptrdiff_t left = p->weight->rows - row;
            bw_finish_token(p, t, row, left < BW_FINISH_ROWS ? left : BW_FINISH_ROWS, sums);
        }
}

bw_status bw_matmul_together(const bw_matrix *x, int n, const bw_quantized *const *weights,
                             const bw_matrix *const *biases, bw_mode mode, bw_dtype dtype, void *const *outs) {
    bw_product products[BW_MOST_TOGETHER];
    int n_few = 0;
    if (n < 0 || n > BW_MOST_TOGETHER) return BW_ERR_ARGUMENT;
    for (int i = 0; i < n; i++) { /* all are checked before anything is written */
        products[i] = (bw_product){.x = x, .bias = biases[i], .weight = weights[i], .mode = mode, .dtype = dtype};
        products[i].out = outs[i];
        bw_status status = check(&products[i]);
        if (status) return status;
    }
    for (int i = 0; i < n; i++) {
        const bw_product p = products[i];
        if (!x->rows || !p.weight->rows) continue;
        if (!x->cols) store_bias(&p);
        else if (x->rows <= BW_FEW_TOKENS) products[n_few++] = p; /* never ahead of i */
        else {
            bw_status status = bw_multiply_many(&p);
            if (status) return status;
        }
    }
    return n_few ? bw_multiply_few(products, n_few) : BW_OK;
}

bw_status bw_matmul(const bw_matrix *x, const bw_quantized *weight, const bw_matrix *bias, bw_mode mode, bw_dtype dtype,
                    void *out) {
    return bw_matmul_together(x, 1, &weight, &bias, mode, dtype, &out);
}
