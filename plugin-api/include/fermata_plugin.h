/* fermata_plugin.h: the C ABI of Fermata plugins, version 1.
 *
 * Generated from plugin-api/src/abi.rs; do not edit.
 * Layouts are frozen: a table begins with its size and only grows at its end.
 */
#ifndef FERMATA_PLUGIN_H
#define FERMATA_PLUGIN_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define FERMATA_PLUGIN_ABI 1

/* Longest reply, in bytes. */
#define FERMATA_MAX_REPLY 16773120

/* What a function of a plugin returns. */
#define FERMATA_OK           0 /* Done; the reply holds the result. */
#define FERMATA_ERROR        1 /* Failed; the reply holds {"code", "message", "hint"?}. */
#define FERMATA_UNSUPPORTED  2 /* The plugin does not know this method, or its settings leave it out; not an error. */
#define FERMATA_CANCELLED    3 /* Given up because the host asked for it. */
#define FERMATA_PANIC        4 /* The plugin panicked inside; the reply may say more, as for FERMATA_ERROR. */

/* Levels of log lines. */
#define FERMATA_LOG_ERROR    1 /* Something failed. */
#define FERMATA_LOG_WARN     2 /* Something looks wrong. */
#define FERMATA_LOG_INFO     3 /* Something worth knowing happened. */
#define FERMATA_LOG_DEBUG    4 /* Detail for whoever looks for a fault. */

/* Bytes that someone else owns: UTF-8 JSON or text, not terminated by a zero.
 * `ptr` may be null when `len` is 0. */
typedef struct FermataBytes {
    /* First byte. */
    const uint8_t *ptr;
    /* Number of bytes. */
    size_t len;
} FermataBytes;

/* What the host offers to a plugin. It outlives every instance that was created with it.
 * All functions may be called from any thread, none of them keeps the bytes it is given. */
typedef struct FermataHostV1 {
    /* Size of this table in bytes, as the host knows it. */
    size_t size;
    /* To be handed back as the first argument of each function. */
    void *context;
    /* Writes a line to the daemon's log; level is one of FERMATA_LOG_*. */
    void (*log)(void *context, uint32_t level, FermataBytes message);
    /* Says (1 or 0) whether the current call should be given up soon. */
    uint32_t (*cancelled)(void *context);
} FermataHostV1;

/* What a plugin exports: the function fermata_plugin_v1 returns a pointer to one of these,
 * which stays valid until the process ends (a plugin is never unloaded).
 *
 * Each function returns one of FERMATA_OK … FERMATA_PANIC. Bytes put into `*reply` belong to
 * the plugin and are given back through `free`; bytes that it receives belong to the host
 * and are valid during the call only. No exception and no panic may leave a function.
 *
 * `call` and `destroy` of one instance never overlap; `cancel` may come from another thread
 * while a `call` runs. */
typedef struct FermataPluginV1 {
    /* Size of this table in bytes, as the plugin knows it. */
    size_t size;
    /* {"name", "version", "kind": ["checkpoint", "notify"], "settings"?: JSON schema}. */
    int32_t (*describe)(FermataBytes *reply);
    /* Makes an instance from its settings (a JSON object); `*reply` gets the error if any. */
    int32_t (*create)(FermataBytes settings, const FermataHostV1 *host, void **instance,
        FermataBytes *reply);
    /* Runs a method: "checkpoint.save", "checkpoint.restore" or "notify"; others are
     * FERMATA_UNSUPPORTED. Unknown members of a request are to be ignored. */
    int32_t (*call)(void *instance, FermataBytes method, FermataBytes request,
        FermataBytes *reply);
    /* Asks a running call to return soon. Must not block. */
    void (*cancel)(void *instance);
    /* Ends an instance. */
    void (*destroy)(void *instance);
    /* Frees bytes that the plugin put into a `*reply`. */
    void (*free)(uint8_t *ptr, size_t len);
} FermataPluginV1;

/* The one symbol that a plugin exports. */
const FermataPluginV1 *fermata_plugin_v1(void);

#ifdef __cplusplus
}
#endif

#endif /* FERMATA_PLUGIN_H */
