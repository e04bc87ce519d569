/* A disk that misbehaves on order, and one that writes down what was asked of it. Loaded in front of the C library
 * (LD_PRELOAD), so that Python, safetensors and everything else of a real process meet it; nothing of ours is patched.
 *
 * AMFM_FAULTS: rules separated by ';', each of words: OPERATION PATTERN [after=N] [when=FILE] and one effect of
 *   errno=NUMBER         fail
 *   torn=NUMBER          write half of the bytes, then fail at the next call
 *   sleep=SECONDS        answer late
 *   rate=BYTES           let so many bytes a second through (write, pwrite)
 *   kill                 end the process with SIGKILL before the call
 *   ignore               say that it was done, and do nothing (flock alone)
 * OPERATION: open read write fsync rename mkdir unlink rmdir truncate flock, or * for all but flock. PATTERN: as in a shell, over the
 * whole path, where * also matches slashes. The first `after` calls that match pass, and with `times=N` those behind the
 * N that follow; with `when` a rule holds while that file exists.
 *
 * AMFM_HOST: what gethostname answers.
 *
 * AMFM_CLOCK: a file with the number of seconds by which the clock of the day is ahead; without it, or empty, it is right.
 *
 * AMFM_RECORD: a file that gets every operation that changes something below AMFM_RECORD_UNDER, in order:
 *   letter, length of path, path, length of second, second, offset, length of data, data (lengths 4 bytes, offset 8).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <time.h>
#include <unistd.h>

#define MAX_RULES 16

struct rule {
    char operation[16], pattern[512], when[512];
    long after, times, seen;
    int number, torn, tearing, kill;
    double seconds, rate;
};

static struct rule rules[MAX_RULES];
static int num_rules = -1;
static int record_fd = -1;
static char record_under[512];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;


static void read_rules(void) {
    char text[8192], *rest = text, *line;
    const char *given = getenv("AMFM_FAULTS"), *file = getenv("AMFM_RECORD"), *under = getenv("AMFM_RECORD_UNDER");
    if (file && under) {
        snprintf(record_under, sizeof record_under, "%s", under);
        record_fd = (int)syscall(SYS_openat, AT_FDCWD, file, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    }
    int count = 0;
    snprintf(text, sizeof text, "%s", given ? given : "");
    while ((line = strsep(&rest, ";")) && count < MAX_RULES) {
        struct rule rule = {0};
        char *word, *words = line;
        int place = 0;
        while ((word = strsep(&words, " "))) {
            if (!*word) continue;
            if (!strncmp(word, "after=", 6)) rule.after = atol(word + 6);
            else if (!strncmp(word, "times=", 6)) rule.times = atol(word + 6);
            else if (!strncmp(word, "when=", 5)) snprintf(rule.when, sizeof rule.when, "%s", word + 5);
            else if (!strncmp(word, "errno=", 6)) rule.number = atoi(word + 6);
            else if (!strncmp(word, "torn=", 5)) rule.number = atoi(word + 5), rule.torn = 1;
            else if (!strncmp(word, "sleep=", 6)) rule.seconds = atof(word + 6);
            else if (!strncmp(word, "rate=", 5)) rule.rate = atof(word + 5);
            else if (!strcmp(word, "ignore")) rule.number = -1;
            else if (!strcmp(word, "kill")) rule.kill = 1;
            else if (place++ == 0) snprintf(rule.operation, sizeof rule.operation, "%s", word);
            else snprintf(rule.pattern, sizeof rule.pattern, "%s", word);
        }
        if (place == 2) rules[count++] = rule;
    }
    num_rules = count;
}

__attribute__((constructor)) static void begin(void) { read_rules(); }

static void absolute(int folder, const char *path, char *out) {
    char base[4096] = "", link[64];
    if (path[0] != '/') {
        if (folder == AT_FDCWD) {
            if (!getcwd(base, sizeof base)) base[0] = 0;
        } else {
            snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
            ssize_t length = readlink(link, base, sizeof base - 1);
            base[length > 0 ? length : 0] = 0;
        }
    }
    snprintf(out, 4096, "%s%s%s", base, base[0] ? "/" : "", path);
}

static void path_of(int fd, char *out) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, out, 4095);
    out[length > 0 ? length : 0] = 0;
}

/* Whether a call must fail (errno is set); `bytes` of a write may be made fewer by a torn one. */
static int judge(const char *operation, const char *path, size_t *bytes) {
    for (int index = 0; index < num_rules; index++) {
        struct rule *rule = &rules[index];
        if (strcmp(rule->operation, "*") && strcmp(rule->operation, operation)) continue;
        if (fnmatch(rule->pattern, path, 0)) continue;
        if (rule->when[0] && syscall(SYS_faccessat, AT_FDCWD, rule->when, F_OK)) continue;
        long seen = __sync_fetch_and_add(&rule->seen, 1);
        if (seen < rule->after || (rule->times && seen >= rule->after + rule->times)) continue;
        if (rule->kill) kill(getpid(), SIGKILL);
        double seconds = rule->seconds + (rule->rate && bytes ? *bytes / rule->rate : 0);
        if (seconds > 0) {
            struct timespec wait = {(time_t)seconds, (long)((seconds - (long)seconds) * 1e9)};
            while (nanosleep(&wait, &wait)) {}
        }
        if (!rule->number) continue;
        if (rule->torn && bytes && *bytes > 1 && !rule->tearing) {
            rule->tearing = 1;
            *bytes /= 2;
            return 0;
        }
        errno = rule->number;
        return 1;
    }
    return 0;
}

static void put(char letter, const char *path, const char *second, int64_t offset, const void *data, size_t length) {
    if (record_fd < 0 || strncmp(path, record_under, strlen(record_under))) return;
    uint32_t first = strlen(path), other = strlen(second), size = length;
    size_t total = 1 + 4 + first + 4 + other + 8 + 4 + length;
    char *entry = malloc(total), *at = entry;
    *at++ = letter;
    memcpy(at, &first, 4), memcpy(at + 4, path, first), at += 4 + first;
    memcpy(at, &other, 4), memcpy(at + 4, second, other), at += 4 + other;
    memcpy(at, &offset, 8), memcpy(at + 8, &size, 4), at += 12;
    if (length) memcpy(at, data, length);
    pthread_mutex_lock(&lock);
    for (size_t done = 0; done < total;) {
        long count = syscall(SYS_write, record_fd, entry + done, total - done);
        if (count <= 0) break;
        done += count;
    }
    pthread_mutex_unlock(&lock);
    free(entry);
}

static int open_any(int folder, const char *path, int flags, mode_t mode) {
    char full[4096];
    absolute(folder, path, full);
    if (judge("open", full, NULL)) return -1;
    int existed = !syscall(SYS_faccessat, AT_FDCWD, full, F_OK);
    int fd = (int)syscall(SYS_openat, folder, path, flags | O_LARGEFILE, mode);
    if (fd >= 0 && (flags & O_CREAT) && !existed) put('c', full, "", 0, NULL, 0);
    if (fd >= 0 && (flags & O_TRUNC) && existed) put('t', full, "", 0, NULL, 0);
    return fd;
}

static mode_t mode_of(int flags, va_list arguments) {
    return (flags & (O_CREAT | __O_TMPFILE)) ? va_arg(arguments, mode_t) : 0;
}

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        va_list arguments; \
        va_start(arguments, flags); \
        mode_t mode = mode_of(flags, arguments); \
        va_end(arguments); \
        return open_any(AT_FDCWD, path, flags, mode); \
    }
#define OPENAT(name) \
    int name(int folder, const char *path, int flags, ...) { \
        va_list arguments; \
        va_start(arguments, flags); \
        mode_t mode = mode_of(flags, arguments); \
        va_end(arguments); \
        return open_any(folder, path, flags, mode); \
    }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

/* Apart from `write_any`, for its stack: 4 KiB are half of what a signal's handler has. */
__attribute__((noinline)) static ssize_t write_file(int fd, const void *data, size_t bytes, int64_t offset) {
    char path[4096];
    path_of(fd, path);
    if (path[0] == '/' && judge("write", path, &bytes)) return -1;
    if (path[0] == '/' && record_fd >= 0) {
        int64_t at = offset;
        if (at < 0) {
            struct stat facts;
            at = (fcntl(fd, F_GETFL) & O_APPEND) && !fstat(fd, &facts) ? facts.st_size : lseek(fd, 0, SEEK_CUR);
        }
        ssize_t count = offset < 0 ? syscall(SYS_write, fd, data, bytes) : syscall(SYS_pwrite64, fd, data, bytes, offset);
        if (count > 0) put('w', path, "", at, data, (size_t)count);
        return count;
    }
    return offset < 0 ? syscall(SYS_write, fd, data, bytes) : syscall(SYS_pwrite64, fd, data, bytes, offset);
}

/* Python's handlers of signals write to a pipe, those of faults to stderr: neither is looked at. */
static ssize_t write_any(int fd, const void *data, size_t bytes, int64_t offset) {
    struct stat facts;
    if ((num_rules > 0 || record_fd >= 0) && fd != STDERR_FILENO && !fstat(fd, &facts) && S_ISREG(facts.st_mode))
        return write_file(fd, data, bytes, offset);
    return offset < 0 ? syscall(SYS_write, fd, data, bytes) : syscall(SYS_pwrite64, fd, data, bytes, offset);
}

ssize_t write(int fd, const void *data, size_t bytes) { return write_any(fd, data, bytes, -1); }
ssize_t pwrite(int fd, const void *data, size_t bytes, off_t offset) { return write_any(fd, data, bytes, offset); }
ssize_t pwrite64(int fd, const void *data, size_t bytes, off64_t offset) { return write_any(fd, data, bytes, offset); }

static int judge_fd(const char *operation, int fd, char *path) {
    path_of(fd, path);
    return path[0] == '/' && judge(operation, path, NULL);
}

ssize_t read(int fd, void *data, size_t bytes) {
    char path[4096];
    if (num_rules > 0 && judge_fd("read", fd, path)) return -1;
    return syscall(SYS_read, fd, data, bytes);
}
ssize_t pread64(int fd, void *data, size_t bytes, off64_t offset) {
    char path[4096];
    if (num_rules > 0 && judge_fd("read", fd, path)) return -1;
    return syscall(SYS_pread64, fd, data, bytes, offset);
}

static int sync_any(int fd, long number) {
    char path[4096];
    if (judge_fd("fsync", fd, path)) return -1;
    int result = (int)syscall(number, fd);
    if (!result) put('s', path, "", 0, NULL, 0);
    return result;
}
int fsync(int fd) { return sync_any(fd, SYS_fsync); }
int fdatasync(int fd) { return sync_any(fd, SYS_fdatasync); }

static int truncate_any(int fd, int64_t length) {
    char path[4096];
    if (judge_fd("truncate", fd, path)) return -1;
    int result = (int)syscall(SYS_ftruncate, fd, length);
    if (!result) put('t', path, "", length, NULL, 0);
    return result;
}
int ftruncate(int fd, off_t length) { return truncate_any(fd, length); }
int ftruncate64(int fd, off64_t length) { return truncate_any(fd, length); }

static int rename_any(int from_folder, const char *from, int to_folder, const char *to) {
    char source[4096], target[4096];
    absolute(from_folder, from, source), absolute(to_folder, to, target);
    if (judge("rename", source, NULL)) return -1;
    int result = (int)syscall(SYS_renameat2, from_folder, from, to_folder, to, 0);
    if (!result) put('r', source, target, 0, NULL, 0);
    return result;
}
int rename(const char *from, const char *to) { return rename_any(AT_FDCWD, from, AT_FDCWD, to); }
int renameat(int from_folder, const char *from, int to_folder, const char *to) {
    return rename_any(from_folder, from, to_folder, to);
}

static int make_any(int folder, const char *path, mode_t mode) {
    char full[4096];
    absolute(folder, path, full);
    if (judge("mkdir", full, NULL)) return -1;
    int result = (int)syscall(SYS_mkdirat, folder, path, mode);
    if (!result) put('m', full, "", 0, NULL, 0);
    return result;
}
int mkdir(const char *path, mode_t mode) { return make_any(AT_FDCWD, path, mode); }
int mkdirat(int folder, const char *path, mode_t mode) { return make_any(folder, path, mode); }

static int remove_any(int folder, const char *path, int flags) {
    char full[4096];
    absolute(folder, path, full);
    if (judge(flags & AT_REMOVEDIR ? "rmdir" : "unlink", full, NULL)) return -1;
    int result = (int)syscall(SYS_unlinkat, folder, path, flags);
    if (!result) put(flags & AT_REMOVEDIR ? 'd' : 'u', full, "", 0, NULL, 0);
    return result;
}
int unlink(const char *path) { return remove_any(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return remove_any(AT_FDCWD, path, AT_REMOVEDIR); }
int unlinkat(int folder, const char *path, int flags) { return remove_any(folder, path, flags); }

/* A file system that keeps locks on one host: the lock of another host is not seen. */
int flock(int fd, int operation) {
    char path[4096];
    path_of(fd, path);
    for (int index = 0; index < num_rules; index++)
        if (rules[index].number == -1 && !strcmp(rules[index].operation, "flock") && !fnmatch(rules[index].pattern, path, 0))
            return 0;
    return (int)syscall(SYS_flock, fd, operation);
}

int gethostname(char *name, size_t size) {
    const char *given = getenv("AMFM_HOST");
    if (given) return snprintf(name, size, "%s", given), 0;
    struct utsname facts;
    if (uname(&facts)) return -1;
    return snprintf(name, size, "%s", facts.nodename), 0;
}

/* Only the clock of the day: a machine's other clocks are never set. */
int clock_gettime(clockid_t clock, struct timespec *time) {
    int result = (int)syscall(SYS_clock_gettime, clock, time);
    const char *file = clock == CLOCK_REALTIME ? getenv("AMFM_CLOCK") : NULL;
    if (file) {
        char text[32] = "";
        int fd = (int)syscall(SYS_openat, AT_FDCWD, file, O_RDONLY | O_CLOEXEC, 0);
        if (fd >= 0) {
            syscall(SYS_read, fd, text, sizeof text - 1);
            syscall(SYS_close, fd);
        }
        time->tv_sec += atol(text);
    }
    return result;
}
