/* What hurts a process from below: loaded before libc, it counts the calls that change files inside one folder,
   and from a chosen one on lets them fail, raises a signal, or sets the clock back. Nothing is hurt until `hurt_arm`. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum fault { NONE, SIGNAL, FAIL_ON, FAIL_ONCE, CLOCK_BACK, STOP_ON };
enum kind { DATA = 1, SYNC = 2, CREATE = 4, OPEN = 8, FOLDER = 16, RENAME = 32, LINK = 64, REMOVE = 128, CUT = 256 };

static char root[PATH_MAX];
static long first;
static enum fault fault;
static int number, mask;
static atomic_long calls, hits;

/* root: folder that counts. first: number of the call, from 1. number: signal, errno, or seconds. mask: kinds that fail. */
void hurt_arm(const char *folder, long call, int what, int with, int kinds) {
  snprintf(root, sizeof root, "%s/", folder);
  first = call, fault = what, number = with, mask = kinds;
  calls = hits = 0;
}

long hurt_calls(void) { return calls; }
long hurt_hits(void) { return hits; }

static int path_inside(int folder, const char *path) {
  char whole[PATH_MAX * 2], link[64];
  if (!root[0] || !path) return 0;
  if (path[0] == '/') return strncmp(path, root, strlen(root)) == 0;
  if (folder == AT_FDCWD) {
    if (!getcwd(whole, PATH_MAX)) return 0;
  } else {
    snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    ssize_t length = readlink(link, whole, PATH_MAX - 1);
    if (length < 0) return 0;
    whole[length] = 0;
  }
  strcat(whole, "/");
  strncat(whole, path, PATH_MAX - 1);
  return strncmp(whole, root, strlen(root)) == 0;
}

static int is_inside(int descriptor) {
  char link[64], path[PATH_MAX];
  if (!root[0]) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0) return 0;
  path[length] = 0;
  return strncmp(path, root, strlen(root)) == 0;
}

/* One more call of a kind; 1 where it has to fail, with errno set. */
static int is_hurt(enum kind kind) {
  long call = ++calls;
  if (fault == SIGNAL && call == first) {
    hits++;
    kill(getpid(), number);
  } else if (fault == STOP_ON && call >= first) {
    hits++;
    kill(getpid(), SIGSTOP);
  } else if (fault == CLOCK_BACK && call == first) {
    hits++;
  } else if ((fault == FAIL_ON || fault == FAIL_ONCE) && call >= first && (kind & mask)) {
    if (fault == FAIL_ONCE && hits) return 0;
    hits++;
    errno = number;
    return 1;
  }
  return 0;
}

/* Looked up once in each place. */
#define REAL(name) ({ \
  static __typeof__(&name) found; \
  if (!found) found = (__typeof__(&name))dlsym(RTLD_NEXT, #name); \
  found; \
})

/* A disk that becomes full takes a part of what is written first. */
static int takes_half(size_t size) { return number == ENOSPC && hits == 1 && size > 1; }

ssize_t write(int descriptor, const void *data, size_t size) {
  if (is_inside(descriptor) && is_hurt(DATA)) {
    if (!takes_half(size)) return -1;
    size /= 2;
  }
  return REAL(write)(descriptor, data, size);
}

ssize_t pwrite64(int descriptor, const void *data, size_t size, off64_t place) {
  if (is_inside(descriptor) && is_hurt(DATA)) {
    if (!takes_half(size)) return -1;
    size /= 2;
  }
  return REAL(pwrite64)(descriptor, data, size, place);
}

ssize_t pwrite(int descriptor, const void *data, size_t size, off_t place) {
  return pwrite64(descriptor, data, size, place);
}

ssize_t writev(int descriptor, const struct iovec *parts, int count) {
  if (is_inside(descriptor) && is_hurt(DATA)) return -1;
  return REAL(writev)(descriptor, parts, count);
}

ssize_t copy_file_range(int from, off64_t *from_place, int to, off64_t *place, size_t size, unsigned flags) {
  if (is_inside(to) && is_hurt(DATA)) return -1;
  return REAL(copy_file_range)(from, from_place, to, place, size, flags);
}

extern ssize_t sendfile64(int to, int from, off64_t *place, size_t size);
ssize_t sendfile64(int to, int from, off64_t *place, size_t size) {
  if (is_inside(to) && is_hurt(DATA)) return -1;
  return REAL(sendfile64)(to, from, place, size);
}
ssize_t sendfile(int to, int from, off_t *place, size_t size) { return sendfile64(to, from, place, size); }

int fsync(int descriptor) { return is_inside(descriptor) && is_hurt(SYNC) ? -1 : REAL(fsync)(descriptor); }
int fdatasync(int descriptor) { return is_inside(descriptor) && is_hurt(SYNC) ? -1 : REAL(fdatasync)(descriptor); }

int ftruncate64(int descriptor, off64_t size) {
  return is_inside(descriptor) && is_hurt(CUT) ? -1 : REAL(ftruncate64)(descriptor, size);
}
int ftruncate(int descriptor, off_t size) { return ftruncate64(descriptor, size); }

static int open_fails(int folder, const char *path, int flags) {
  if (!(flags & (O_CREAT | O_WRONLY | O_RDWR | O_TRUNC)) || !path_inside(folder, path)) return 0;
  int is_there = faccessat(folder, path, F_OK, 0) == 0;
  if (is_there && (flags & O_EXCL)) return 0;
  return is_hurt(is_there ? OPEN : CREATE);
}

#define MODE(flags) \
  mode_t mode = 0; \
  if ((flags) & (O_CREAT | O_TMPFILE)) { \
    va_list rest; \
    va_start(rest, flags); \
    mode = va_arg(rest, mode_t); \
    va_end(rest); \
  }

int open(const char *path, int flags, ...) {
  MODE(flags)
  return open_fails(AT_FDCWD, path, flags) ? -1 : REAL(open)(path, flags, mode);
}
int open64(const char *path, int flags, ...) {
  MODE(flags)
  return open_fails(AT_FDCWD, path, flags) ? -1 : REAL(open64)(path, flags, mode);
}
int openat(int folder, const char *path, int flags, ...) {
  MODE(flags)
  return open_fails(folder, path, flags) ? -1 : REAL(openat)(folder, path, flags, mode);
}
int openat64(int folder, const char *path, int flags, ...) {
  MODE(flags)
  return open_fails(folder, path, flags) ? -1 : REAL(openat64)(folder, path, flags, mode);
}

static int mode_fails(const char *path, const char *mode) {
  return mode[0] != 'r' || strchr(mode, '+') ? open_fails(AT_FDCWD, path, O_CREAT | O_WRONLY) : 0;
}
FILE *fopen(const char *path, const char *mode) { return mode_fails(path, mode) ? NULL : REAL(fopen)(path, mode); }
FILE *fopen64(const char *path, const char *mode) {
  return mode_fails(path, mode) ? NULL : REAL(fopen64)(path, mode);
}

/* A system tells first that a name is missing or taken, and then that it may not change it. */
static int name_fails(enum kind kind, int folder, const char *path, int is_made) {
  if (!path_inside(folder, path)) return 0;
  int is_there = faccessat(folder, path, F_OK, AT_SYMLINK_NOFOLLOW) == 0;
  return is_there != is_made && is_hurt(kind);
}

int mkdir(const char *path, mode_t mode) {
  return name_fails(FOLDER, AT_FDCWD, path, 1) ? -1 : REAL(mkdir)(path, mode);
}
int mkdirat(int folder, const char *path, mode_t mode) {
  return name_fails(FOLDER, folder, path, 1) ? -1 : REAL(mkdirat)(folder, path, mode);
}
int rename(const char *from, const char *to) {
  return name_fails(RENAME, AT_FDCWD, from, 0) ? -1 : REAL(rename)(from, to);
}
int renameat(int from_folder, const char *from, int folder, const char *to) {
  return name_fails(RENAME, from_folder, from, 0) ? -1 : REAL(renameat)(from_folder, from, folder, to);
}
int link(const char *from, const char *to) {
  return name_fails(LINK, AT_FDCWD, to, 1) ? -1 : REAL(link)(from, to);
}
int linkat(int from_folder, const char *from, int folder, const char *to, int flags) {
  return name_fails(LINK, folder, to, 1) ? -1 : REAL(linkat)(from_folder, from, folder, to, flags);
}
int unlink(const char *path) { return name_fails(REMOVE, AT_FDCWD, path, 0) ? -1 : REAL(unlink)(path); }
int unlinkat(int folder, const char *path, int flags) {
  return name_fails(REMOVE, folder, path, 0) ? -1 : REAL(unlinkat)(folder, path, flags);
}
int rmdir(const char *path) { return name_fails(REMOVE, AT_FDCWD, path, 0) ? -1 : REAL(rmdir)(path); }

int clock_gettime(clockid_t clock, struct timespec *now) {
  int code = REAL(clock_gettime)(clock, now);
  if (fault == CLOCK_BACK && calls >= first && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
    now->tv_sec -= number;
  return code;
}
int gettimeofday(struct timeval *restrict now, void *restrict zone) {
  int code = REAL(gettimeofday)(now, zone);
  if (fault == CLOCK_BACK && calls >= first) now->tv_sec -= number;
  return code;
}
time_t time(time_t *place) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (place) *place = now.tv_sec;
  return now.tv_sec;
}
