/* For LD_PRELOAD: the n-th system call of a kind below one directory fails, once or from then on, or kills the process.
 * Python and every library in the process go through here, so that none can write unseen. Calls that fail have no
 * effect, except close, which closes first as Linux does. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { KILL = -1 };

static struct {
    char root[PATH_MAX], kind[16];
    long n, seen;
    int error, for_good;
} fault;

/* `kind`: "write", "fsync", "rename", "close", "open" (for creating) or "mkdir"; `error`: an errno, or -1 for SIGKILL.
 * n = 0 fails nothing and only counts. */
void fault_arm(const char *root, const char *kind, long n, int error, int for_good);
void fault_arm(const char *root, const char *kind, long n, int error, int for_good) {
    snprintf(fault.root, sizeof fault.root, "%s", root);
    snprintf(fault.kind, sizeof fault.kind, "%s", kind);
    fault.n = n;
    fault.error = error;
    fault.for_good = for_good;
    fault.seen = 0;
}

/* Calls of the kind since then. */
long fault_seen(void);
long fault_seen(void) {
    return fault.seen;
}

/* 1 with errno set when this call must fail. */
static int hit(const char *kind, const char *path) {
    if (!fault.root[0] || strcmp(kind, fault.kind) || strncmp(path, fault.root, strlen(fault.root))) return 0;
    fault.seen++;
    if (!fault.n || !(fault.seen == fault.n || (fault.for_good && fault.seen > fault.n))) return 0;
    if (fault.error == KILL) kill(getpid(), SIGKILL);
    errno = fault.error;
    return 1;
}

static int hit_file(const char *kind, int descriptor) {
    char link[64], path[PATH_MAX];
    int before = errno;
    if (!fault.root[0] || strcmp(kind, fault.kind)) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t n = readlink(link, path, sizeof path - 1);
    errno = before;
    if (n < 0) return 0;
    path[n] = 0;
    return hit(kind, path);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t write(int d, const void *data, size_t n) {
    return hit_file("write", d) ? -1 : REAL(write)(d, data, n);
}

ssize_t writev(int d, const struct iovec *parts, int n) {
    return hit_file("write", d) ? -1 : REAL(writev)(d, parts, n);
}

ssize_t pwrite64(int d, const void *data, size_t n, off64_t at) {
    return hit_file("write", d) ? -1 : REAL(pwrite64)(d, data, n, at);
}

int ftruncate64(int d, off64_t n) {
    return hit_file("write", d) ? -1 : REAL(ftruncate64)(d, n);
}

int fsync(int d) {
    return hit_file("fsync", d) ? -1 : REAL(fsync)(d);
}

int fdatasync(int d) {
    return hit_file("fsync", d) ? -1 : REAL(fdatasync)(d);
}

int close(int d) {
    int failed = hit_file("close", d), error = errno, status = REAL(close)(d);
    if (failed) errno = error;
    return failed ? -1 : status;
}

int rename(const char *from, const char *to) {
    return hit("rename", to) ? -1 : REAL(rename)(from, to);
}

int renameat(int from_directory, const char *from, int to_directory, const char *to) {
    return hit("rename", to) ? -1 : REAL(renameat)(from_directory, from, to_directory, to);
}

int mkdir(const char *path, mode_t mode) {
    return hit("mkdir", path) ? -1 : REAL(mkdir)(path, mode);
}

int open64(const char *path, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? (mode_t)va_arg(rest, unsigned) : 0;
    va_end(rest);
    return flags & O_CREAT && hit("open", path) ? -1 : REAL(open64)(path, flags, mode);
}

int open(const char *path, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? (mode_t)va_arg(rest, unsigned) : 0;
    va_end(rest);
    return flags & O_CREAT && hit("open", path) ? -1 : REAL(open)(path, flags, mode);
}
