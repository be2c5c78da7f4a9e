/* A hint to the CPU that a thread waits in a loop. */
#ifndef BW_PAUSE_H
#define BW_PAUSE_H

#if defined(__x86_64__)
#include <immintrin.h>
#define BW_PAUSE() _mm_pause()
#elif defined(__aarch64__)
#define BW_PAUSE() __asm__ volatile("yield")
#else
#define BW_PAUSE() ((void)0)
#endif

#endif
