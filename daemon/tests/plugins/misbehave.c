/* A plugin for the tests. MODE selects its misbehaviour; in mode GOOD it works. */
#define _GNU_SOURCE
#include "fermata_plugin.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define GOOD 0
#define CRASH 1            /* segmentation fault in call */
#define HANG 2             /* ignores the cancel as well */
#define PRINT 3            /* garbage on stdout and stderr, then does its job */
#define FD3 4              /* garbage on descriptor 3 */
#define EXIT 5             /* exit(0) in call */
#define CRASH_IN_DESCRIBE 6
#define LEAK 7             /* allocates for ever */
#define WAIT 8             /* hangs, but listens to the cancel */
#define CLOSE3 9           /* closes descriptor 3 */
#define OVERSIZED 10       /* announces a frame of 4 GiB */
#define REFUSE 11          /* refuses to be created */
#define HANG_IN_DESCRIBE 12
#define FLOOD 13           /* logs for ever */
#define ESCAPE 14          /* names a file outside its directory */
#define CHILD 15           /* starts a child in a group of its own, then hangs */

#ifndef VERSION
#define VERSION "1"
#endif

typedef struct {
    const FermataHostV1 *host;
    volatile int cancelled;
} Instance;

static void say(FermataBytes *reply, const char *text) {
    size_t len = strlen(text);
    uint8_t *copy = malloc(len);
    if (copy == NULL) abort();
    memcpy(copy, text, len);
    reply->ptr = copy;
    reply->len = len;
}

static int is(FermataBytes bytes, const char *text) {
    return bytes.len == strlen(text) && memcmp(bytes.ptr, text, bytes.len) == 0;
}

static void spill(int fd, const void *bytes, size_t len) {
    if (write(fd, bytes, len) < 0) abort();
}

/* A real fault: a handler that expects to be re-entered would swallow a raised SIGSEGV. */
static void crash(void) {
    volatile int *volatile nowhere = NULL;
    *nowhere = 1;
}

static int32_t t_describe(FermataBytes *reply) {
    if (MODE == CRASH_IN_DESCRIBE) crash();
    if (MODE == HANG_IN_DESCRIBE)
        for (;;) pause();
    say(reply, "{\"name\":\"test\",\"version\":\"" VERSION
               "\",\"kind\":[\"checkpoint\",\"notify\"]}");
    return FERMATA_OK;
}

static int32_t t_create(FermataBytes settings, const FermataHostV1 *host, void **instance,
                        FermataBytes *reply) {
    (void)settings;
    if (MODE == REFUSE) {
        say(reply, "{\"code\":\"no\",\"message\":\"not like this\",\"hint\":\"try harder\"}");
        return FERMATA_ERROR;
    }
    Instance *self = calloc(1, sizeof *self);
    if (self == NULL) abort();
    self->host = host;
    *instance = self;
    return FERMATA_OK;
}

/* Finds "directory":"..." in the request; good enough for paths without escapes. */
static int save(FermataBytes request, FermataBytes *reply) {
    char text[8192], path[4096];
    size_t len = request.len < sizeof text - 1 ? request.len : sizeof text - 1;
    memcpy(text, request.ptr, len);
    text[len] = 0;
    const char *start = strstr(text, "\"directory\":\"");
    if (start == NULL) return FERMATA_ERROR;
    start += strlen("\"directory\":\"");
    snprintf(path, sizeof path, "%.*s/state.bin", (int)strcspn(start, "\""), start);
    FILE *file = fopen(path, "w");
    if (file == NULL) return FERMATA_ERROR;
    fputs("state", file);
    fclose(file);
    say(reply, MODE == ESCAPE ? "{\"artifacts\":[{\"path\":\"../other\"}]}"
                              : "{\"artifacts\":[{\"path\":\"state.bin\"}]}");
    return FERMATA_OK;
}

static int32_t t_call(void *instance, FermataBytes method, FermataBytes request,
                      FermataBytes *reply) {
    Instance *self = instance;
    static const uint8_t huge[] = {0xff, 0xff, 0xff, 0xff};
    switch (MODE) {
    case CRASH: crash(); break;
    case HANG:
        for (;;) pause();
    case PRINT:
        printf("garbage on stdout\n");
        fflush(stdout);
        fprintf(stderr, "garbage on stderr\n");
        break;
    case FD3: spill(3, "garbage on three\n", 17); break;
    case EXIT: exit(0);
    case LEAK:
        for (;;) {
            char *block = malloc(1 << 20);
            if (block != NULL) memset(block, 1, 1 << 20);
        }
    case WAIT:
        while (!self->host->cancelled(self->host->context)) usleep(1000);
        return FERMATA_CANCELLED;
    case CLOSE3:
        close(3);
        for (;;) pause();
    case OVERSIZED: spill(3, huge, sizeof huge); break;
    case FLOOD:
        for (;;) self->host->log(self->host->context, FERMATA_LOG_INFO, method);
    case CHILD: {
        pid_t pid = fork();
        if (pid == 0) {
            setpgid(0, 0);
            for (;;) pause();
        }
        char line[64];
        int len = snprintf(line, sizeof line, "child %d", (int)pid);
        self->host->log(self->host->context, FERMATA_LOG_INFO,
                        (FermataBytes){(const uint8_t *)line, (size_t)len});
        for (;;) pause();
    }
    default: break;
    }
    if (is(method, "checkpoint.save")) return save(request, reply);
    if (is(method, "notify")) {
        self->host->log(self->host->context, FERMATA_LOG_INFO, request);
        return FERMATA_OK;
    }
    return FERMATA_UNSUPPORTED;
}

static void t_cancel(void *instance) { ((Instance *)instance)->cancelled = 1; }
static void t_destroy(void *instance) { free(instance); }
static void t_free(uint8_t *ptr, size_t len) {
    (void)len;
    free(ptr);
}

static const FermataPluginV1 TABLE = {sizeof(FermataPluginV1), t_describe, t_create, t_call,
                                      t_cancel,  t_destroy, t_free};

const FermataPluginV1 *fermata_plugin_v1(void) { return &TABLE; }
