/* What GPTQ and refinement need of a Hessian: its columns ordered and split into blocks, damped, and factored.
 *
 * With A = H + damping (columns in `order`) and A = U D UT, U unit upper triangular, the error E = W - Q of a row
 * costs  E A ET = sum over k of D[k] * (E[k] + sum over j < k of E[j] U[j][k])^2.  So column k, seen after the columns
 * before it, is best rounded from W[k] + sum E[j] U[j][k]; that is GPTQ without an inverse (LDLQ in QuIP's terms,
 * arXiv 2307.13304). */
#ifndef BW_FACTOR_H
#define BW_FACTOR_H

#include "bitween.h"

enum { BW_LONGEST_BLOCK = 128 };

/* Positions first .. first+n-1, which belong to one group. */
typedef struct {
    ptrdiff_t first, n, group;
} bw_block;

typedef struct {
    ptrdiff_t n, n_blocks;
    bw_block *blocks;
    ptrdiff_t *order;      /* column at each position */
    float *hessian;        /* (n, n): A */
    float *feedback;       /* (n, n): row k holds U[0..k-1][k]; the rest is unspecified */
    float *variance;       /* (n): D */
    float *local_feedback; /* (n, BW_LONGEST_BLOCK): the same for each block of A alone; columns count from its first */
    float *local_variance; /* (n) */
    float *added;          /* (n): what the diagonal of A has more than that of H */
    double unit;           /* A is in units of this: the mean of the diagonal of H over live columns, or 1 */
    double damping;        /* the part of the mean diagonal that was added */
    ptrdiff_t n_dead;      /* columns with H[j][j] = 0 */
} bw_factor;

/* BW_ERR_HESSIAN unless (n, n) is symmetric up to rounding, finite, with a diagonal >= 0. */
bw_status bw_check_hessian(const float *h, ptrdiff_t n);

/* h (n, n) symmetric fp32. Groups of `group` columns; by_activation puts the most active groups, and columns
 * within, first. Damping grows when the factorisation fails. Release with bw_factor_free in every case. */
bw_status bw_factor_new(const float *h, ptrdiff_t n, ptrdiff_t group, int by_activation, double damping,
                        bw_factor *factor);
void bw_factor_free(bw_factor *factor);

#endif
