/* fermata_plugin.h: the C ABI of Fermata plugins, version 1.
 *
 * Generated from plugin-api/src/abi.rs; do not edit.
 * Layouts are frozen: a table begins with its size and only grows at the end.
 */
#ifndef FERMATA_PLUGIN_H
#define FERMATA_PLUGIN_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define FERMATA_PLUGIN_ABI 1

/* The maximum size of a reply, in bytes. */
#define FERMATA_MAX_REPLY 16773120

/* Return values of the functions of a plugin. */
#define FERMATA_OK           0 /* Success; the reply is the result. */
#define FERMATA_ERROR        1 /* Failure; the reply is {"code", "message", "hint"?}. */
#define FERMATA_UNSUPPORTED  2 /* The plugin, or its configuration, does not support this method; not an error. */
#define FERMATA_CANCELLED    3 /* Cancelled by the host. */
#define FERMATA_PANIC        4 /* The plugin panicked; the reply may be as for FERMATA_ERROR. */

/* Levels of log lines. */
#define FERMATA_LOG_ERROR    1 /* An operation failed. */
#define FERMATA_LOG_WARN     2 /* A problem that does not prevent the operation. */
#define FERMATA_LOG_INFO     3 /* A notable event. */
#define FERMATA_LOG_DEBUG    4 /* Details for debugging. */

/* Borrowed bytes: UTF-8 JSON or text, not terminated by a zero byte.
 * `ptr` may be null when `len` is 0. */
typedef struct FermataBytes {
    /* The first byte. */
    const uint8_t *ptr;
    /* The number of bytes. */
    size_t len;
} FermataBytes;

/* The functions of the host. The table outlives every instance that was created with it.
 * All functions may be called from any thread; none keeps the bytes that it receives. */
typedef struct FermataHostV1 {
    /* The size of this table in the version of the host, in bytes. */
    size_t size;
    /* The first argument of each function. */
    void *context;
    /* Writes a line to the log of the daemon; level is one of FERMATA_LOG_*. */
    void (*log)(void *context, uint32_t level, FermataBytes message);
    /* Returns 1 when the current call was cancelled and should return soon, else 0. */
    uint32_t (*cancelled)(void *context);
} FermataHostV1;

/* The functions of a plugin: fermata_plugin_v1 returns a pointer to this table, which must
 * stay valid until the process exits (a plugin is never unloaded).
 *
 * Each function returns one of FERMATA_OK … FERMATA_PANIC. Bytes written to `*reply` belong
 * to the plugin, and the host returns them through `free`; bytes that the plugin receives
 * belong to the host and are valid during the call only. No exception or panic may leave a
 * function.
 *
 * `call` and `destroy` of one instance never overlap; `cancel` may be called from another
 * thread during a `call`. */
typedef struct FermataPluginV1 {
    /* The size of this table in the version of the plugin, in bytes. */
    size_t size;
    /* {"name", "version", "kind": ["checkpoint", "notify"], "settings"?: JSON schema}. */
    int32_t (*describe)(FermataBytes *reply);
    /* Creates an instance from its settings (a JSON object); `*reply` gets the error, if any. */
    int32_t (*create)(FermataBytes settings, const FermataHostV1 *host, void **instance,
        FermataBytes *reply);
    /* Runs a method: "checkpoint.save", "checkpoint.restore" or "notify"; others return
     * FERMATA_UNSUPPORTED. Unknown members of a request must be ignored. */
    int32_t (*call)(void *instance, FermataBytes method, FermataBytes request,
        FermataBytes *reply);
    /* Asks the current call to return soon. Must not block. */
    void (*cancel)(void *instance);
    /* Destroys an instance. */
    void (*destroy)(void *instance);
    /* Frees bytes that the plugin wrote to a `*reply`. */
    void (*free)(uint8_t *ptr, size_t len);
} FermataPluginV1;

/* The symbol that a plugin exports. */
const FermataPluginV1 *fermata_plugin_v1(void);

#ifdef __cplusplus
}
#endif

#endif /* FERMATA_PLUGIN_H */
