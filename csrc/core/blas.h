/* Dense products and factorisations, row-major, single-threaded: our own pool splits the work, so that results
 * do not depend on the number of threads. Safe to call from several threads. */
#ifndef BW_BLAS_H
#define BW_BLAS_H

#include "bitween.h"

/* c (m, n) = alpha * op(a) op(b) + beta * c; op transposes when the flag is set. Leading dimensions in elements. */
void bw_sgemm(int transpose_a, int transpose_b, ptrdiff_t m, ptrdiff_t n, ptrdiff_t k, float alpha, const float *a,
              ptrdiff_t lda, const float *b, ptrdiff_t ldb, float beta, float *c, ptrdiff_t ldc);
/* c (n, n), upper triangle only, = alpha * aT a + beta * c with a (k, n). */
void bw_ssyrk(ptrdiff_t n, ptrdiff_t k, float alpha, const float *a, ptrdiff_t lda, float beta, float *c,
              ptrdiff_t ldc);
/* In place: upper triangle of a symmetric positive (n, n) matrix -> U with UT U = a. BW_ERR_FACTOR if not positive. */
bw_status bw_dpotrf_upper(ptrdiff_t n, double *a, ptrdiff_t lda);
/* After bw_dpotrf_upper: b (m, n), row by row, -> b (UT U)^-1. */
bw_status bw_dpotrs_upper(ptrdiff_t n, ptrdiff_t m, const double *a, ptrdiff_t lda, double *b, ptrdiff_t ldb);

/* Makes OpenBLAS take what it keeps for the calling thread. Where that fails, the C library ends the process; so
 * the pool does it when a worker starts, not in the middle of some later product. */
void bw_blas_prepare_thread(void);

#endif
