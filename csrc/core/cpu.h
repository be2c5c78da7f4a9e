/* The instruction set in use. */
#ifndef BW_CPU_H
#define BW_CPU_H

#include "kernels/table.h"

/* The chosen set; chosen on first use when bw_choose_isa has not been called. */
const bw_isa *bw_cpu(void);

#endif
