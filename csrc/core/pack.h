/* Zeros of one row: always dense, ternary ones in 2 bits. */
#ifndef BW_PACK_H
#define BW_PACK_H

#include "bitween.h"

void bw_pack_zeros(const uint8_t *zeros, ptrdiff_t n, int32_t levels, uint8_t *packed);
/* Returns the largest zero. */
int bw_unpack_zeros(const uint8_t *packed, ptrdiff_t n, int32_t levels, uint8_t *zeros);

#endif
