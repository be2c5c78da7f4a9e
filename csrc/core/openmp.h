/* The threads of an OpenMP runtime that is in the process already. */
#ifndef BW_OPENMP_H
#define BW_OPENMP_H

/* Finds GNU's runtime, if something (PyTorch) has loaded it: nothing is loaded here. 1 when its threads can be
 * borrowed from now on. */
int bw_openmp_find(void);
/* Runs fn(context) on at most n of them at once, the caller among them. 0 when there are none to borrow: never in a
 * forked child, where they do not exist. */
int bw_openmp_run(int n, void (*fn)(void *), void *context);

#endif
