/* The k largest of n numbers, those that torch.topk takes among equal ones. */
#ifndef BW_CHOOSE_H
#define BW_CHOOSE_H

#include "bitween.h"

typedef struct {
    float value;
    int32_t index;
} bw_ranked;

/* Puts the k largest of n in front, the largest first; NaN counts as the largest. 1 <= k <= n. */
void bw_choose(bw_ranked *all, ptrdiff_t n, ptrdiff_t k);

#endif
