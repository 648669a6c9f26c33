/* Loaded before the C library (LD_PRELOAD): operations on files below $BROKEN_STORAGE_FOLDER fail or are slow while
 * $BROKEN_STORAGE_CONTROL holds "CALL VALUE": CALL is open, write, sync, rename or mkdir and VALUE the errno to fail
 * with, or -1 for a call that hangs; or "slow" and the bytes that are written in a second. tests/faults/storage.py says
 * more. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static long value_of(const char *call) {
  const char *path = getenv("BROKEN_STORAGE_CONTROL");
  char text[64] = {0}, kind[16];
  long value;
  if (!path) return 0;
  int file = (int)syscall(SYS_openat, AT_FDCWD, path, O_RDONLY | O_CLOEXEC);
  if (file < 0) return 0;
  long length = syscall(SYS_read, file, text, sizeof text - 1);
  syscall(SYS_close, file);
  if (length <= 0 || sscanf(text, "%15s %ld", kind, &value) != 2) return 0;
  return strcmp(kind, call) ? 0 : value;
}

static int is_below(const char *path) {
  const char *folder = getenv("BROKEN_STORAGE_FOLDER");
  return folder && path && !strncmp(path, folder, strlen(folder));
}

static int is_below_at(int directory, const char *path) {
  char link[64], place[PATH_MAX];
  if (path && (path[0] == '/' || directory == AT_FDCWD)) return is_below(path);
  snprintf(link, sizeof link, "/proc/self/fd/%d", directory);
  ssize_t length = readlink(link, place, sizeof place - 1);
  if (length < 0) return 0;
  place[length] = 0;
  return is_below(place);
}

static int fails(const char *call, int directory, const char *path) {
  int saved = errno, error = (int)value_of(call);
  if (error && is_below_at(directory, path))
    while (error < 0) {
      usleep(20000);
      error = (int)value_of(call);
    }
  if (!error || !is_below_at(directory, path)) {
    errno = saved;
    return 0;
  }
  errno = error;
  return 1;
}

static void delay(int file, ssize_t bytes) {
  int saved = errno;
  long rate = value_of("slow");
  if (rate > 0 && bytes > 0 && is_below_at(file, NULL)) usleep((useconds_t)(1000000.0 * (double)bytes / (double)rate));
  errno = saved;
}

#define WRITES(name, parameters, ...)                        \
  ssize_t name parameters {                                  \
    if (fails("write", file, NULL)) return -1;               \
    ssize_t written = REAL(name)(__VA_ARGS__);               \
    delay(file, written);                                    \
    return written;                                          \
  }
WRITES(write, (int file, const void *data, size_t size), file, data, size)
WRITES(pwrite, (int file, const void *data, size_t size, off_t at), file, data, size, at)
WRITES(pwrite64, (int file, const void *data, size_t size, off64_t at), file, data, size, at)
WRITES(writev, (int file, const struct iovec *parts, int count), file, parts, count)
WRITES(pwritev, (int file, const struct iovec *parts, int count, off_t at), file, parts, count, at)
WRITES(pwritev64, (int file, const struct iovec *parts, int count, off64_t at), file, parts, count, at)

#define SYNCS(name) \
  int name(int file) { return fails("sync", file, NULL) ? -1 : REAL(name)(file); }
SYNCS(fsync)
SYNCS(fdatasync)

#define OPENS(name, directory, parameters, ...)                                  \
  int name parameters {                                                          \
    va_list rest;                                                                \
    va_start(rest, flags);                                                       \
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;      \
    va_end(rest);                                                                \
    if ((flags & O_ACCMODE) != O_RDONLY && fails("open", directory, path)) return -1; \
    return REAL(name)(__VA_ARGS__, mode);                                        \
  }
OPENS(open, AT_FDCWD, (const char *path, int flags, ...), path, flags)
OPENS(open64, AT_FDCWD, (const char *path, int flags, ...), path, flags)
OPENS(openat, directory, (int directory, const char *path, int flags, ...), directory, path, flags)
OPENS(openat64, directory, (int directory, const char *path, int flags, ...), directory, path, flags)

int mkdir(const char *path, mode_t mode) { return fails("mkdir", AT_FDCWD, path) ? -1 : REAL(mkdir)(path, mode); }
int mkdirat(int directory, const char *path, mode_t mode) {
  return fails("mkdir", directory, path) ? -1 : REAL(mkdirat)(directory, path, mode);
}
int rename(const char *from, const char *to) { return fails("rename", AT_FDCWD, to) ? -1 : REAL(rename)(from, to); }
int renameat(int first, const char *from, int second, const char *to) {
  return fails("rename", second, to) ? -1 : REAL(renameat)(first, from, second, to);
}
int renameat2(int first, const char *from, int second, const char *to, unsigned flags) {
  return fails("rename", second, to) ? -1 : REAL(renameat2)(first, from, second, to, flags);
}
