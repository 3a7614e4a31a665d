/* Count a program's changes to the files below a folder, and fail or kill it at one of them.
 *
 * Loaded by LD_PRELOAD. `file_faults_arm` reads FILE_FAULTS_* from the environment, and so does
 * every process that the program starts; all share the counter in FILE_FAULTS_COUNTER.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char root[PATH_MAX];
static size_t root_length;
static long *counter, at;
static enum { COUNT, KILL, FULL, BROKEN } mode;

#define REAL(name) \
    static __typeof__(&name) real; \
    if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

void file_faults_arm(void) {
    const char *folder = getenv("FILE_FAULTS_ROOT"), *file = getenv("FILE_FAULTS_COUNTER");
    const char *kind = getenv("FILE_FAULTS_MODE"), *place = getenv("FILE_FAULTS_AT");
    root_length = 0;
    if (!folder || !file || !kind || !place) return;
    int fd = open(file, O_RDWR);
    if (fd < 0) return;
    counter = mmap(NULL, sizeof(long), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (counter == MAP_FAILED) return;
    at = atol(place);
    mode = !strcmp(kind, "kill") ? KILL : !strcmp(kind, "ENOSPC") ? FULL
         : !strcmp(kind, "EIO") ? BROKEN : COUNT;
    snprintf(root, sizeof root, "%s", folder);
    root_length = strlen(root);
}

__attribute__((constructor)) static void start(void) { file_faults_arm(); }

static int below(const char *path) {
    return !strncmp(path, root, root_length) && (path[root_length] == '/' || !path[root_length]);
}

static int path_below(int folder, const char *path) {
    if (!root_length || !path) return 0;
    if (path[0] == '/') return below(path);
    char link[64], place[PATH_MAX];
    snprintf(link, sizeof link, folder == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", folder);
    ssize_t length = readlink(link, place, sizeof place - 1);
    if (length < 0) return 0;
    place[length] = 0;
    return below(place);
}

static int file_below(int fd) {
    if (!root_length || fd < 0) return 0;
    char link[64], place[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, place, sizeof place - 1);
    if (length < 0) return 0;
    place[length] = 0;
    return below(place);
}

/* Count one change. Return 1 if it has to fail, with errno set, 2 if the process has to die. */
static int change(int grows) {
    long number = __atomic_add_fetch(counter, 1, __ATOMIC_SEQ_CST);
    if (mode == KILL && number == at) return 2;
    /* A full disk stays full, and lets files be removed. An error of the device comes once. */
    if (mode == FULL && number >= at && grows) { errno = ENOSPC; return 1; }
    if (mode == BROKEN && number == at) { errno = EIO; return 1; }
    return 0;
}

static void die(void) { kill(0, SIGKILL); for (;;) pause(); }

#define CHANGE(inside, grows) \
    if (inside) { \
        int fault = change(grows); \
        if (fault == 2) die(); \
        if (fault) return -1; \
    }

/* A write that a kill interrupts leaves its first half. */
#define WRITE(half) \
    if (file_below(fd)) { \
        int fault = change(1); \
        if (fault == 2) { (void)!(half); die(); } \
        if (fault) return -1; \
    }

ssize_t write(int fd, const void *data, size_t size) {
    REAL(write);
    WRITE(real(fd, data, size / 2));
    return real(fd, data, size);
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t place) {
    REAL(pwrite);
    WRITE(real(fd, data, size / 2, place));
    return real(fd, data, size, place);
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t place) {
    REAL(pwrite64);
    WRITE(real(fd, data, size / 2, place));
    return real(fd, data, size, place);
}
ssize_t writev(int fd, const struct iovec *parts, int count) {
    REAL(writev);
    WRITE(real(fd, parts, count / 2));
    return real(fd, parts, count);
}
int fsync(int fd) { REAL(fsync); CHANGE(file_below(fd), 1); return real(fd); }
int fdatasync(int fd) { REAL(fdatasync); CHANGE(file_below(fd), 1); return real(fd); }
int ftruncate(int fd, off_t size) {
    REAL(ftruncate); CHANGE(file_below(fd), 1); return real(fd, size);
}
int ftruncate64(int fd, off64_t size) {
    REAL(ftruncate64); CHANGE(file_below(fd), 1); return real(fd, size);
}
int rename(const char *from, const char *to) {
    REAL(rename); CHANGE(path_below(AT_FDCWD, to), 1); return real(from, to);
}
int renameat(int a, const char *from, int b, const char *to) {
    REAL(renameat); CHANGE(path_below(b, to), 1); return real(a, from, b, to);
}
int link(const char *from, const char *to) {
    REAL(link); CHANGE(path_below(AT_FDCWD, to), 1); return real(from, to);
}
int linkat(int a, const char *from, int b, const char *to, int flags) {
    REAL(linkat); CHANGE(path_below(b, to), 1); return real(a, from, b, to, flags);
}
int unlink(const char *path) {
    REAL(unlink); CHANGE(path_below(AT_FDCWD, path), 0); return real(path);
}
int unlinkat(int folder, const char *path, int flags) {
    REAL(unlinkat); CHANGE(path_below(folder, path), 0); return real(folder, path, flags);
}
int rmdir(const char *path) {
    REAL(rmdir); CHANGE(path_below(AT_FDCWD, path), 0); return real(path);
}
int mkdir(const char *path, mode_t bits) {
    REAL(mkdir); CHANGE(path_below(AT_FDCWD, path), 1); return real(path, bits);
}
int mkdirat(int folder, const char *path, mode_t bits) {
    REAL(mkdirat); CHANGE(path_below(folder, path), 1); return real(folder, path, bits);
}

#define OPEN(name, signature, inside, call) \
    int name signature { \
        REAL(name); \
        mode_t bits = 0; \
        if (flags & (O_CREAT | __O_TMPFILE)) { \
            va_list rest; \
            va_start(rest, flags); \
            bits = va_arg(rest, mode_t); \
            va_end(rest); \
        } \
        /* Opening changes nothing unless it makes or empties the file. */ \
        CHANGE((flags & (O_CREAT | O_TRUNC)) && (inside), 1); \
        return call; \
    }
OPEN(open, (const char *path, int flags, ...), path_below(AT_FDCWD, path), real(path, flags, bits))
OPEN(open64, (const char *path, int flags, ...), path_below(AT_FDCWD, path),
     real(path, flags, bits))
OPEN(openat, (int folder, const char *path, int flags, ...), path_below(folder, path),
     real(folder, path, flags, bits))
OPEN(openat64, (int folder, const char *path, int flags, ...), path_below(folder, path),
     real(folder, path, flags, bits))
