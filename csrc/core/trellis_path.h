/* The best path of one tile. */
#ifndef BW_TRELLIS_PATH_H
#define BW_TRELLIS_PATH_H

#include "cpu.h"

/* Bytes of the costs that a search needs. */
ptrdiff_t bw_path_bytes(int width, int rate);
/* codes[i] = code of weight i on a path that bites its tail: first around the ring from its middle, or where it need
 * not be thorough around its seam only, to see which group the seam has, then around again from that group to itself.
 * walk: width, rate, values, columns, x and costs are set. */
void bw_find_path(bw_walk *walk, int thorough, uint8_t *codes);
/* The tile's bytes from its codes, and back to values of -510 .. 510. */
void bw_pack_path(const uint8_t *codes, int rate, uint8_t *tile);
void bw_path_values(const uint8_t *codes, int width, int rate, int16_t *values);

#endif
