/* The end of a product, the same for few rows and for many. */
#include <string.h>

#include "cpu.h"
#include "matmul.h"
#include "scheme.h"

void bw_finish_token(const bw_product *p, ptrdiff_t token, ptrdiff_t row, ptrdiff_t n, float *sums) {
    float bias[BW_FINISH_ROWS];
    if (p->bias) {
        bw_cpu()->load_row(p->bias, 0, row, n, bias);
        for (ptrdiff_t r = 0; r < n; r++) sums[r] += bias[r];
    }
    ptrdiff_t size = p->dtype == BW_F32 ? 4 : 2;
    bw_cpu()->store(sums, n, p->dtype, p->out + (token * p->weight->rows + row) * size);
}
