//! Converts a [`Plugin`] into a table of C functions.
//!
//! No panic leaves these functions, and every reply is a boxed slice, which the `free` of the [`table`] takes back. Use [`export_plugin!`](crate::export_plugin),
//! not this module.

use crate::abi::{self, FermataBytes, FermataHostV1, FermataPluginV1};
use crate::message::{
    CHECKPOINT_RESTORE, CHECKPOINT_SAVE, CallError, NOTIFY, NotifyRequest, RestoreRequest, SaveReply, SaveRequest,
};
use crate::plugin::{Host, Plugin};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::any::Any;
use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Exports a type that implements [`Plugin`] as the plugin of this shared object.
#[macro_export]
macro_rules! export_plugin {
    ($plugin:ty) => {
        /// The entry point of the plugin ABI.
        // SAFETY: the name is reserved by Fermata; a shared object exports it at most once.
        #[unsafe(no_mangle)]
        pub extern "C" fn fermata_plugin_v1() -> *const $crate::abi::FermataPluginV1 {
            static TABLE: $crate::abi::FermataPluginV1 = $crate::glue::table::<$plugin>();
            &TABLE
        }
    };
}

/// Returns the table of functions of a plugin.
pub const fn table<P: Plugin>() -> FermataPluginV1 {
    FermataPluginV1 {
        size: size_of::<FermataPluginV1>(),
        describe: Some(describe::<P>),
        create: Some(create::<P>),
        call: Some(call::<P>),
        cancel: Some(cancel::<P>),
        destroy: Some(destroy::<P>),
        free: Some(free),
    }
}

unsafe extern "C" fn describe<P: Plugin>(reply: *mut FermataBytes) -> i32 {
    // SAFETY: the host passes a valid place for the reply.
    unsafe { answer(reply, || encode(&P::describe())) }
}

unsafe extern "C" fn create<P: Plugin>(
    settings: FermataBytes,
    host: *const FermataHostV1,
    instance: *mut *mut c_void,
    reply: *mut FermataBytes,
) -> i32 {
    let make = || {
        // SAFETY: the settings are valid during this call.
        let settings: Value = decode(unsafe { settings.view() })?;
        // SAFETY: by the ABI the table of the host outlives the instance.
        let host = unsafe { Host::from_raw(host) };
        let plugin = Box::new(P::create(settings, host)?);
        // SAFETY: the host passes a valid place for the instance; `destroy` takes the box back.
        unsafe { instance.write(Box::into_raw(plugin).cast()) };
        Ok(Vec::new())
    };
    // SAFETY: the host passes a valid place for the reply.
    unsafe { answer(reply, make) }
}

unsafe extern "C" fn call<P: Plugin>(
    instance: *mut c_void,
    method: FermataBytes,
    request: FermataBytes,
    reply: *mut FermataBytes,
) -> i32 {
    let run = || {
        // SAFETY: `create` returned the instance, `destroy` has not been called, and there are only shared references to it.
        let plugin = unsafe { &*instance.cast_const().cast::<P>() };
        // SAFETY: method and request are valid during this call.
        let (method, request) = unsafe { (method.view(), request.view()) };
        dispatch(plugin, method.unwrap_or_default(), request)
    };
    // SAFETY: the host passes a valid place for the reply.
    unsafe { answer(reply, run) }
}

fn dispatch<P: Plugin>(plugin: &P, method: &[u8], request: Option<&[u8]>) -> Result<Vec<u8>, CallError> {
    let method = std::str::from_utf8(method).unwrap_or_default();
    match (method, plugin.checkpointer(), plugin.notifier()) {
        (CHECKPOINT_SAVE, Some(checkpointer), _) => {
            let artifacts = checkpointer.save(&decode::<SaveRequest>(request)?)?;
            encode(&SaveReply { artifacts })
        }
        (CHECKPOINT_RESTORE, Some(checkpointer), _) => {
            encode(&checkpointer.restore(&decode::<RestoreRequest>(request)?)?)
        }
        (NOTIFY, _, Some(notifier)) => {
            notifier.notify(&decode::<NotifyRequest>(request)?.event)?;
            Ok(Vec::new())
        }
        _ => Err(CallError::unsupported(method)),
    }
}

unsafe extern "C" fn cancel<P: Plugin>(instance: *mut c_void) {
    // SAFETY: as in `call`.
    let plugin = unsafe { &*instance.cast_const().cast::<P>() };
    // The panic hook has reported a panic; `cancel` has no result.
    drop(catch_unwind(AssertUnwindSafe(|| plugin.cancel())));
}

unsafe extern "C" fn destroy<P: Plugin>(instance: *mut c_void) {
    // SAFETY: `create` allocated the box, and `destroy` is the last call for it.
    let plugin = unsafe { Box::from_raw(instance.cast::<P>()) };
    drop(catch_unwind(AssertUnwindSafe(move || drop(plugin))));
}

unsafe extern "C" fn free(ptr: *mut u8, len: usize) {
    if ptr.is_null() {
        return;
    }
    // SAFETY: `into_reply` allocated this box from a slice of `len` bytes.
    drop(unsafe { Box::from_raw(std::ptr::slice_from_raw_parts_mut(ptr, len)) });
}

/// Runs `work`, catches its panics, and writes its result or error to `*reply`.
///
/// # Safety
/// `reply` must be null or valid for writes.
unsafe fn answer(reply: *mut FermataBytes, work: impl FnOnce() -> Result<Vec<u8>, CallError>) -> i32 {
    let (status, bytes) = match catch_unwind(AssertUnwindSafe(work)) {
        Ok(Ok(bytes)) => (abi::STATUS_OK, bytes),
        Ok(Err(error)) => (
            match error.code.as_str() {
                CallError::UNSUPPORTED => abi::STATUS_UNSUPPORTED,
                CallError::CANCELLED => abi::STATUS_CANCELLED,
                _ => abi::STATUS_ERROR,
            },
            encode(&error).unwrap_or_default(),
        ),
        Err(panic) => {
            let error = CallError::new("panic", format!("the plugin panicked: {}", panic_message(&*panic)));
            // Dropping the payload of a panic may panic again.
            std::mem::forget(panic);
            (abi::STATUS_PANIC, encode(&error).unwrap_or_default())
        }
    };
    if !reply.is_null() {
        // SAFETY: by the contract of this function; the old value needs no drop.
        unsafe { reply.write(into_reply(bytes)) };
    }
    status
}

/// Passes bytes to the host, which returns them through `free`.
fn into_reply(bytes: Vec<u8>) -> FermataBytes {
    if bytes.is_empty() {
        return FermataBytes::EMPTY;
    }
    let len = bytes.len();
    let ptr = Box::into_raw(bytes.into_boxed_slice()).cast::<u8>();
    FermataBytes { ptr, len }
}

fn panic_message(panic: &(dyn Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("with a payload that is not a string")
}

fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, CallError> {
    serde_json::to_vec(value).map_err(|error| CallError::new("encoding", format!("the reply is not JSON: {error}")))
}

fn decode<T: DeserializeOwned>(bytes: Option<&[u8]>) -> Result<T, CallError> {
    serde_json::from_slice(bytes.unwrap_or_default())
        .map_err(|error| CallError::new("bad_request", format!("the request is not valid: {error}")))
}
