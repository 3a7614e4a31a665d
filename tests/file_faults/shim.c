/* Count a program's changes to the files below a folder, and fail or kill it at one of them.
 *
 * Loaded by LD_PRELOAD. `file_faults_arm` reads FILE_FAULTS_* from the environment, and so does
 * every process that the program starts; all share the counter in FILE_FAULTS_COUNTER.
 *
 * In mode "record" nothing fails. The folder FILE_FAULTS_TRACE then gets a line in `log` for each
 * change of a folder and each fsync, and a copy of each file at its fsync, named by the change's
 * number. `power.py` reads them.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char root[PATH_MAX];
static size_t root_length;
static long *counter, at;
static enum { COUNT, KILL, FULL, BROKEN, RECORD } mode;
static char trace[PATH_MAX];
static int log_file = -1;
static pthread_mutex_t recording = PTHREAD_MUTEX_INITIALIZER;
static __thread long number; /* of the change that this thread makes */

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
         : !strcmp(kind, "EIO") ? BROKEN : !strcmp(kind, "record") ? RECORD : COUNT;
    if (mode == RECORD) {
        const char *given = getenv("FILE_FAULTS_TRACE");
        if (!given) return;
        snprintf(trace, sizeof trace, "%s", given);
        char name[PATH_MAX + 8];
        snprintf(name, sizeof name, "%s/log", trace);
        log_file = syscall(SYS_openat, AT_FDCWD, name, O_WRONLY | O_CREAT | O_APPEND, 0644);
        if (log_file < 0) return;
    }
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
    number = __atomic_add_fetch(counter, 1, __ATOMIC_SEQ_CST);
    if (mode == KILL && number == at) return 2;
    /* A full disk stays full, and lets files be removed. An error of the device comes once. */
    if (mode == FULL && number >= at && grows) { errno = ENOSPC; return 1; }
    if (mode == BROKEN && number == at) { errno = EIO; return 1; }
    return 0;
}

static void die(void) { kill(0, SIGKILL); for (;;) pause(); }

/* Lines of the log: NUMBER, a kind, and inode numbers and names, with tabs between. */

static void record(const char *format, ...) {
    char line[2 * PATH_MAX];
    int length = snprintf(line, sizeof line, "%ld\t", number);
    va_list rest;
    va_start(rest, format);
    length += vsnprintf(line + length, sizeof line - length, format, rest);
    va_end(rest);
    syscall(SYS_write, log_file, line, length);
}

static long inode(int folder, const char *path) {
    struct stat found;
    return fstatat(folder, path, &found, AT_SYMLINK_NOFOLLOW) ? 0 : (long)found.st_ino;
}

/* The folder that holds a path, and the path's last name. */
static long parent(int folder, const char *path, char *name) {
    char above[PATH_MAX];
    snprintf(above, sizeof above, "%s", path);
    size_t length = strlen(above);
    while (length > 1 && above[length - 1] == '/') above[--length] = 0;
    char *slash = strrchr(above, '/');
    snprintf(name, NAME_MAX + 1, "%.*s", NAME_MAX, slash ? slash + 1 : above);
    if (!slash) return inode(folder, ".");
    if (slash == above) slash++;
    *slash = 0;
    return inode(folder, above);
}

static void record_made(const char *kind, int folder, const char *path) {
    char name[NAME_MAX + 1];
    long above = parent(folder, path, name);
    record("%s\t%ld\t%s\t%ld\n", kind, above, name, inode(folder, path));
}

static void record_gone(int folder, const char *path) {
    char name[NAME_MAX + 1];
    long above = parent(folder, path, name);
    record("gone\t%ld\t%s\n", above, name);
}

static void record_renamed(int a, const char *from, int b, const char *to) {
    char old[NAME_MAX + 1], new[NAME_MAX + 1];
    long before = parent(a, from, old), after = parent(b, to, new);
    record("rename\t%ld\t%s\t%ld\t%s\n", before, old, after, new);
}

static void record_cut(int fd, long size) {
    struct stat found;
    if (!fstat(fd, &found)) record("cut\t%ld\t%ld\n", (long)found.st_ino, size);
}

static void record_synced(int fd) {
    struct stat found;
    if (fstat(fd, &found)) return;
    if (S_ISDIR(found.st_mode)) {
        record("folder synced\t%ld\n", (long)found.st_ino);
        return;
    }
    char name[PATH_MAX + 24], self[64], piece[1 << 16];
    snprintf(name, sizeof name, "%s/%ld", trace, number);
    int copy = syscall(SYS_openat, AT_FDCWD, name, O_WRONLY | O_CREAT | O_TRUNC, 0644);
    /* By the file's own descriptor where it can be read: closing another would end its locks. */
    int source = fd, flags = fcntl(fd, F_GETFL);
    snprintf(self, sizeof self, "/proc/self/fd/%d", fd);
    if ((flags & O_ACCMODE) == O_WRONLY)
        source = syscall(SYS_openat, AT_FDCWD, self, O_RDONLY, 0);
    ssize_t size;
    off_t place = 0;
    while ((size = pread(source, piece, sizeof piece, place)) > 0) {
        syscall(SYS_write, copy, piece, size);
        place += size;
    }
    syscall(SYS_close, copy);
    if (source != fd) syscall(SYS_close, source);
    record("synced\t%ld\n", (long)found.st_ino);
}

/* Note an event of the program's own, such as an answer that it counts as kept. */
void file_faults_mark(void) {
    if (mode != RECORD || !root_length) return;
    pthread_mutex_lock(&recording);
    number = __atomic_load_n(counter, __ATOMIC_SEQ_CST);
    record("mark\n");
    pthread_mutex_unlock(&recording);
}

/* Make a change that `inside` says is below the root, and record it if it succeeds. */
#define RECORDED(inside, call, line) \
    if (mode == RECORD && (inside)) { \
        pthread_mutex_lock(&recording); \
        number = __atomic_add_fetch(counter, 1, __ATOMIC_SEQ_CST); \
        __typeof__(call) result = call; \
        int error = errno; \
        if (result >= 0) { line; } \
        pthread_mutex_unlock(&recording); \
        errno = error; \
        return result; \
    }

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
int fsync(int fd) {
    REAL(fsync);
    RECORDED(file_below(fd), real(fd), record_synced(fd))
    CHANGE(file_below(fd), 1);
    return real(fd);
}
int fdatasync(int fd) {
    REAL(fdatasync);
    RECORDED(file_below(fd), real(fd), record_synced(fd))
    CHANGE(file_below(fd), 1);
    return real(fd);
}
int ftruncate(int fd, off_t size) {
    REAL(ftruncate);
    RECORDED(file_below(fd), real(fd, size), record_cut(fd, size))
    CHANGE(file_below(fd), 1);
    return real(fd, size);
}
int ftruncate64(int fd, off64_t size) {
    REAL(ftruncate64);
    RECORDED(file_below(fd), real(fd, size), record_cut(fd, size))
    CHANGE(file_below(fd), 1);
    return real(fd, size);
}
int rename(const char *from, const char *to) {
    REAL(rename);
    RECORDED(path_below(AT_FDCWD, to), real(from, to), record_renamed(AT_FDCWD, from, AT_FDCWD, to))
    CHANGE(path_below(AT_FDCWD, to), 1);
    return real(from, to);
}
int renameat(int a, const char *from, int b, const char *to) {
    REAL(renameat);
    RECORDED(path_below(b, to), real(a, from, b, to), record_renamed(a, from, b, to))
    CHANGE(path_below(b, to), 1);
    return real(a, from, b, to);
}
int link(const char *from, const char *to) {
    REAL(link);
    RECORDED(path_below(AT_FDCWD, to), real(from, to), record_made("link", AT_FDCWD, to))
    CHANGE(path_below(AT_FDCWD, to), 1);
    return real(from, to);
}
int linkat(int a, const char *from, int b, const char *to, int flags) {
    REAL(linkat);
    RECORDED(path_below(b, to), real(a, from, b, to, flags), record_made("link", b, to))
    CHANGE(path_below(b, to), 1);
    return real(a, from, b, to, flags);
}
int unlink(const char *path) {
    REAL(unlink);
    RECORDED(path_below(AT_FDCWD, path), real(path), record_gone(AT_FDCWD, path))
    CHANGE(path_below(AT_FDCWD, path), 0);
    return real(path);
}
int unlinkat(int folder, const char *path, int flags) {
    REAL(unlinkat);
    RECORDED(path_below(folder, path), real(folder, path, flags), record_gone(folder, path))
    CHANGE(path_below(folder, path), 0);
    return real(folder, path, flags);
}
int rmdir(const char *path) {
    REAL(rmdir);
    RECORDED(path_below(AT_FDCWD, path), real(path), record_gone(AT_FDCWD, path))
    CHANGE(path_below(AT_FDCWD, path), 0);
    return real(path);
}
int mkdir(const char *path, mode_t bits) {
    REAL(mkdir);
    RECORDED(path_below(AT_FDCWD, path), real(path, bits), record_made("folder", AT_FDCWD, path))
    CHANGE(path_below(AT_FDCWD, path), 1);
    return real(path, bits);
}
int mkdirat(int folder, const char *path, mode_t bits) {
    REAL(mkdirat);
    RECORDED(path_below(folder, path), real(folder, path, bits),
             record_made("folder", folder, path))
    CHANGE(path_below(folder, path), 1);
    return real(folder, path, bits);
}

static void record_opened(int folder, const char *path, int flags, int existed) {
    if (!existed) record_made("file", folder, path);
    else if (flags & O_TRUNC) record("cut\t%ld\t0\n", inode(folder, path));
}

/* An O_TMPFILE has no name yet, so it is recorded only when it gets one. */
#define OPEN(name, signature, folder, inside, call) \
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
        int named = (flags & (O_CREAT | O_TRUNC)) && (flags & __O_TMPFILE) != __O_TMPFILE; \
        int existed = mode == RECORD && named && inode(folder, path); \
        RECORDED(named && (inside), call, record_opened(folder, path, flags, existed)) \
        CHANGE((flags & (O_CREAT | O_TRUNC)) && (inside), 1); \
        return call; \
    }
OPEN(open, (const char *path, int flags, ...), AT_FDCWD, path_below(AT_FDCWD, path),
     real(path, flags, bits))
OPEN(open64, (const char *path, int flags, ...), AT_FDCWD, path_below(AT_FDCWD, path),
     real(path, flags, bits))
OPEN(openat, (int folder, const char *path, int flags, ...), folder, path_below(folder, path),
     real(folder, path, flags, bits))
OPEN(openat64, (int folder, const char *path, int flags, ...), folder, path_below(folder, path),
     real(folder, path, flags, bits))
