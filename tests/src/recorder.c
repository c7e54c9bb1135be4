/* Preloaded into a daemon under test: adds a line to the file FERMATA_TEST_FLUSHES for each flush, with the path. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

static void record(int fd)
{
    char link[32], line[4096];
    const char *to = getenv("FERMATA_TEST_FLUSHES");
    if (!to || strcmp(program_invocation_short_name, "fermatad"))
        return;
    int before = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, line, sizeof line - 1);
    int file = open(to, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    /* The library may outlive the test and with it the directory of the file. */
    if (length > 0 && file >= 0) {
        line[length++] = '\n';
        /* In one piece: other threads flush too. */
        if (write(file, line, length) != length)
            abort();
    }
    if (file >= 0)
        close(file);
    errno = before;
}

int fsync(int fd)
{
    record(fd);
    return syscall(SYS_fsync, fd);
}

int fdatasync(int fd)
{
    record(fd);
    return syscall(SYS_fdatasync, fd);
}

int syncfs(int fd)
{
    record(fd);
    return syscall(SYS_syncfs, fd);
}
