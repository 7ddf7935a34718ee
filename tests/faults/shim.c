/* Preloaded into a victim process. Numbers every call that changes something under one folder, and at a given number stops
 * the process (so that somebody else can kill it), tears a write in two, or answers with an error.
 *
 * Syncs of watched files are counted but not carried out: SIGKILL does not lose the page cache, and disks are slow.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#define LONG_PATH (2 * PATH_MAX + 64)
#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

enum { PASS, FAIL, SHORT, TEAR };

static char folder[PATH_MAX];
static long stop_at, fail_at, calls, writes;
static int armed, tearing, failing, dead, rest_fails, log_fd;

/* stop: number of the call to stop before (tear: of the write to stop in the middle of). fail: number of the call that gets
 * `error`, with `all` every later one too. 0 means never. log: where to write one line for each call, or -1. */
void fault_arm(const char *under, long stop, int tear, long fail, int error, int all, int log)
{
    snprintf(folder, sizeof folder, "%s", under);
    stop_at = stop, tearing = tear, fail_at = fail, failing = error, dead = all, log_fd = log;
    calls = writes = rest_fails = 0;
    armed = 1;
}

void fault_disarm(void)
{
    armed = 0;
}

static int path_of(int fd, char *path)
{
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    if (length < 0)
        return 0;
    path[length] = 0;
    return 1;
}

static int path_at(int dir, const char *name, char *path)
{
    char base[PATH_MAX];
    if (name[0] == '/')
        return snprintf(path, LONG_PATH, "%s", name) > 0;
    if (dir == AT_FDCWD ? !getcwd(base, sizeof base) : !path_of(dir, base))
        return 0;
    return snprintf(path, LONG_PATH, "%s/%s", base, name) > 0;
}

static int watched(const char *path)
{
    size_t length = strlen(folder);
    return strncmp(path, folder, length) == 0 && (path[length] == '/' || path[length] == 0);
}

static int strike(const char *kind, const char *path, size_t size)
{
    if (!watched(path))
        return PASS;
    calls++;
    writes += size > 1;
    if (log_fd >= 0)
        dprintf(log_fd, "%s\t%s\t%zu\n", kind, path + strlen(folder), size);
    if (rest_fails || (fail_at && (calls == fail_at || (dead && calls > fail_at)))) {
        if (calls == fail_at && size > 1 && !dead)
            return rest_fails = 1, SHORT; /* as a disk that runs full: some bytes still go in */
        rest_fails = 0;
        errno = failing;
        return FAIL;
    }
    if (tearing && size > 1 && writes == stop_at)
        return TEAR;
    if (!tearing && calls == stop_at)
        raise(SIGSTOP);
    return PASS;
}

static int strike_fd(const char *kind, int fd, size_t size)
{
    char path[LONG_PATH];
    int before = errno;
    if (!armed || fd == log_fd || !path_of(fd, path)) {
        errno = before;
        return PASS;
    }
    return strike(kind, path, size);
}

static int strike_at(const char *kind, int dir, const char *name)
{
    char path[LONG_PATH];
    return armed && path_at(dir, name, path) ? strike(kind, path, 0) : PASS;
}

#define WRITER(name, arguments, whole, half)                                                                                  \
    ssize_t name arguments                                                                                                    \
    {                                                                                                                         \
        int verdict = strike_fd("write", fd, size);                                                                           \
        if (verdict == FAIL)                                                                                                  \
            return -1;                                                                                                        \
        if (verdict == PASS)                                                                                                  \
            return NEXT(name) whole;                                                                                          \
        ssize_t done = NEXT(name) half;                                                                                       \
        if (verdict == TEAR)                                                                                                  \
            raise(SIGSTOP);                                                                                                   \
        return done;                                                                                                          \
    }

WRITER(write, (int fd, const void *data, size_t size), (fd, data, size), (fd, data, size / 2))
WRITER(pwrite, (int fd, const void *data, size_t size, off_t at), (fd, data, size, at), (fd, data, size / 2, at))
WRITER(pwrite64, (int fd, const void *data, size_t size, off64_t at), (fd, data, size, at), (fd, data, size / 2, at))

#define CALL(type, name, parameters, arguments, verdict)                                                                      \
    type name parameters                                                                                                      \
    {                                                                                                                         \
        return (verdict) == FAIL ? -1 : NEXT(name) arguments;                                                                 \
    }

CALL(ssize_t, writev, (int fd, const struct iovec *v, int n), (fd, v, n), strike_fd("write", fd, 1))
CALL(ssize_t, pwritev, (int fd, const struct iovec *v, int n, off_t at), (fd, v, n, at), strike_fd("write", fd, 1))
CALL(ssize_t, sendfile, (int fd, int in, off_t *at, size_t size), (fd, in, at, size), strike_fd("write", fd, 1))
CALL(ssize_t, sendfile64, (int fd, int in, off64_t *at, size_t size), (fd, in, at, size), strike_fd("write", fd, 1))
CALL(ssize_t, copy_file_range, (int in, off64_t *from, int fd, off64_t *at, size_t size, unsigned flags),
     (in, from, fd, at, size, flags), strike_fd("write", fd, 1))
CALL(int, ftruncate, (int fd, off_t size), (fd, size), strike_fd("truncate", fd, 0))
CALL(int, ftruncate64, (int fd, off64_t size), (fd, size), strike_fd("truncate", fd, 0))
CALL(int, chmod, (const char *name, mode_t mode), (name, mode), strike_at("chmod", AT_FDCWD, name))
CALL(int, fchmod, (int fd, mode_t mode), (fd, mode), strike_fd("chmod", fd, 0))
CALL(int, unlink, (const char *name), (name), strike_at("unlink", AT_FDCWD, name))
CALL(int, unlinkat, (int dir, const char *name, int flags), (dir, name, flags), strike_at("unlink", dir, name))
CALL(int, rmdir, (const char *name), (name), strike_at("unlink", AT_FDCWD, name))
CALL(int, mkdir, (const char *name, mode_t mode), (name, mode), strike_at("mkdir", AT_FDCWD, name))
CALL(int, link, (const char *from, const char *to), (from, to), strike_at("link", AT_FDCWD, to))
CALL(int, symlink, (const char *from, const char *to), (from, to), strike_at("link", AT_FDCWD, to))
CALL(int, rename, (const char *from, const char *to), (from, to), strike_at("rename", AT_FDCWD, to))
CALL(int, renameat, (int a, const char *from, int b, const char *to), (a, from, b, to), strike_at("rename", b, to))

#define SYNC(name)                                                                                                            \
    int name(int fd)                                                                                                          \
    {                                                                                                                         \
        long before = calls;                                                                                                  \
        if (strike_fd("fsync", fd, 0) == FAIL)                                                                                \
            return -1;                                                                                                        \
        return calls != before ? 0 : NEXT(name)(fd);                                                                          \
    }

SYNC(fsync)
SYNC(fdatasync)

#define OPEN(name, parameters, arguments, dir)                                                                                \
    int name parameters                                                                                                       \
    {                                                                                                                         \
        va_list rest;                                                                                                         \
        va_start(rest, flags);                                                                                                \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;                                               \
        va_end(rest);                                                                                                         \
        if (flags & (O_CREAT | O_TRUNC) && strike_at("create", dir, path) == FAIL)                                            \
            return -1;                                                                                                        \
        return NEXT(name) arguments;                                                                                          \
    }

OPEN(open, (const char *path, int flags, ...), (path, flags, mode), AT_FDCWD)
OPEN(open64, (const char *path, int flags, ...), (path, flags, mode), AT_FDCWD)
OPEN(openat, (int dir, const char *path, int flags, ...), (dir, path, flags, mode), dir)
OPEN(openat64, (int dir, const char *path, int flags, ...), (dir, path, flags, mode), dir)
