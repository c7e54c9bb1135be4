/* A small plugin in C: echoes notifications, waits for a cancel, refuses bad settings. */
#include "fermata_plugin.h"
#include <stdlib.h>
#include <string.h>

typedef struct {
    const FermataHostV1 *host;
    volatile int calls;
} Echo;

static void give(FermataBytes *reply, const char *text, size_t len) {
    uint8_t *copy = malloc(len);
    if (copy == NULL) return;
    memcpy(copy, text, len);
    reply->ptr = copy;
    reply->len = len;
}

static void say(FermataBytes *reply, const char *text) { give(reply, text, strlen(text)); }

static int is(FermataBytes bytes, const char *text) {
    return bytes.len == strlen(text) && memcmp(bytes.ptr, text, bytes.len) == 0;
}

static int32_t echo_describe(FermataBytes *reply) {
    say(reply, "{\"name\":\"echo\",\"version\":\"1.2.3\",\"kind\":[\"notify\"]}");
    return FERMATA_OK;
}

static int32_t echo_create(FermataBytes settings, const FermataHostV1 *host, void **instance,
                           FermataBytes *reply) {
    if (!is(settings, "{}")) {
        say(reply, "{\"code\":\"bad_settings\",\"message\":\"no settings are known\"}");
        return FERMATA_ERROR;
    }
    Echo *echo = calloc(1, sizeof *echo);
    if (echo == NULL) return FERMATA_ERROR;
    echo->host = host;
    *instance = echo;
    return FERMATA_OK;
}

static int32_t echo_call(void *instance, FermataBytes method, FermataBytes request,
                         FermataBytes *reply) {
    Echo *echo = instance;
    echo->calls++;
    echo->host->log(echo->host->context, FERMATA_LOG_WARN, method);
    if (is(method, "notify")) {
        give(reply, (const char *)request.ptr, request.len);
        return FERMATA_OK;
    }
    if (is(method, "wait")) {
        while (!echo->host->cancelled(echo->host->context)) {}
        return FERMATA_CANCELLED;
    }
    if (is(method, "strange")) return 4711;
    if (is(method, "null")) {
        reply->len = 5;
        return FERMATA_OK;
    }
    return FERMATA_UNSUPPORTED;
}

static void echo_cancel(void *instance) { (void)instance; }
static void echo_destroy(void *instance) { free(instance); }
static void echo_free(uint8_t *ptr, size_t len) {
    (void)len;
    free(ptr);
}

static const FermataPluginV1 TABLE = {
    .size = sizeof(FermataPluginV1),
    .describe = echo_describe,
    .create = echo_create,
    .call = echo_call,
    .cancel = echo_cancel,
    .destroy = echo_destroy,
#ifndef WITHOUT_FREE
    .free = echo_free,
#endif
};

const FermataPluginV1 *fermata_plugin_v1(void) {
#ifdef WITHOUT_FREE
    (void)echo_free;
#endif
    return &TABLE;
}
