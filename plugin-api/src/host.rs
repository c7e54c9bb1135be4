//! The ABI from the side of the host: safe calls of the C functions of a plugin.
//!
//! Sizes, null pointers and JSON are checked, and every reply is copied before it is freed. A plugin that violates the ABI
//! can still crash the process, which is why only `fermata-plugin-host` uses this module, never the daemon.

use crate::abi::{self, FermataBytes, FermataHostV1, FermataPluginV1};
use crate::message::{CallError, Description};
use crate::plugin::LogLevel;
use serde_json::Value;
use std::ffi::c_void;
use std::sync::Arc;

/// The functions that the host offers to its plugin.
pub trait HostServices: Send + Sync + 'static {
    /// Writes a line to the log of the daemon.
    fn log(&self, level: LogLevel, message: &str);
    /// Says whether the current call was cancelled.
    fn cancelled(&self) -> bool;
}

/// The functions of a loaded plugin.
#[derive(Clone, Copy)]
pub struct PluginTable {
    describe: unsafe extern "C" fn(*mut FermataBytes) -> i32,
    create: unsafe extern "C" fn(FermataBytes, *const FermataHostV1, *mut *mut c_void, *mut FermataBytes) -> i32,
    call: unsafe extern "C" fn(*mut c_void, FermataBytes, FermataBytes, *mut FermataBytes) -> i32,
    cancel: unsafe extern "C" fn(*mut c_void),
    destroy: unsafe extern "C" fn(*mut c_void),
    free: unsafe extern "C" fn(*mut u8, usize),
}

impl PluginTable {
    /// Checks and copies the table that a plugin returned; rejects null, short and incomplete tables.
    ///
    /// # Safety
    /// `raw` must be null or point to the table of a plugin that conforms to the ABI, in a shared object that is never
    /// unloaded.
    pub unsafe fn from_raw(raw: *const FermataPluginV1) -> Result<Self, CallError> {
        let incomplete = |what: String| CallError::new("bad_table", what);
        // SAFETY: by the contract of this function.
        let Some((size, table)) = (unsafe { abi::copy_table(raw) }) else {
            return Err(incomplete("the plugin returned a null table".to_owned()));
        };
        let min_size = size_of::<FermataPluginV1>();
        if size < min_size {
            return Err(incomplete(format!("the plugin's table has {size} bytes, at least {min_size} are required")));
        }
        let missing = |name: &str| incomplete(format!("the plugin's table has no function `{name}`"));
        Ok(Self {
            describe: table.describe.ok_or_else(|| missing("describe"))?,
            create: table.create.ok_or_else(|| missing("create"))?,
            call: table.call.ok_or_else(|| missing("call"))?,
            cancel: table.cancel.ok_or_else(|| missing("cancel"))?,
            destroy: table.destroy.ok_or_else(|| missing("destroy"))?,
            free: table.free.ok_or_else(|| missing("free"))?,
        })
    }

    /// Returns the description of the plugin.
    pub fn describe(&self) -> Result<Description, CallError> {
        let mut reply = FermataBytes::EMPTY;
        // SAFETY: the plugin conforms to the ABI, and `reply` is a valid place.
        let status = unsafe { (self.describe)(&mut reply) };
        let bytes = self.conclude("describe", status, reply)?;
        serde_json::from_slice(&bytes).map_err(|error| {
            CallError::new("bad_description", format!("the plugin's description is not valid: {error}"))
        })
    }

    /// Creates an instance.
    pub fn create(&self, settings: &Value, services: Arc<dyn HostServices>) -> Result<Instance, CallError> {
        let settings = settings.to_string();
        let context = Box::into_raw(Box::new(services));
        let host = Box::into_raw(Box::new(FermataHostV1 {
            size: size_of::<FermataHostV1>(),
            context: context.cast(),
            log: Some(log),
            cancelled: Some(cancelled),
        }));
        let mut pointer = std::ptr::null_mut();
        let mut reply = FermataBytes::EMPTY;
        // SAFETY: the plugin conforms to the ABI. The table of the host and its context are leaked on purpose: a detached
        // thread of the plugin may use them until the process exits.
        let status = unsafe { (self.create)(FermataBytes::lend(settings.as_bytes()), host, &mut pointer, &mut reply) };
        self.conclude("create", status, reply)?;
        Ok(Instance { table: *self, pointer })
    }

    /// Copies and frees a reply, and converts the status to a result.
    fn conclude(&self, what: &str, status: i32, reply: FermataBytes) -> Result<Vec<u8>, CallError> {
        // Checked before copying, since a reply could have gigabytes.
        let bytes = if reply.len > abi::MAX_REPLY_BYTES {
            Err(CallError::new(
                "reply_too_long",
                format!("the reply to {what} has {} bytes, at most {} are allowed", reply.len, abi::MAX_REPLY_BYTES),
            ))
        } else {
            // SAFETY: the plugin conforms to the ABI, so the reply is valid until it is freed.
            match unsafe { reply.view() } {
                Some(bytes) => Ok(bytes.to_vec()),
                None => {
                    Err(CallError::new("bad_reply", format!("the reply to {what} is a null pointer with a length")))
                }
            }
        };
        if !reply.ptr.is_null() {
            // SAFETY: the plugin allocated this reply, and it is not used any more.
            unsafe { (self.free)(reply.ptr.cast_mut(), reply.len) };
        }
        let bytes = bytes?;
        let reported = |code: &str, message: String| {
            serde_json::from_slice::<CallError>(&bytes).unwrap_or_else(|_| CallError::new(code, message))
        };
        match status {
            abi::STATUS_OK => Ok(bytes),
            abi::STATUS_UNSUPPORTED => Err(CallError::unsupported(what)),
            abi::STATUS_CANCELLED => Err(CallError::cancelled()),
            abi::STATUS_PANIC => Err(reported("panic", format!("the plugin panicked in {what}"))),
            abi::STATUS_ERROR => {
                Err(reported("plugin_error", format!("the plugin failed in {what} without a message")))
            }
            other => {
                Err(CallError::new("bad_status", format!("the plugin answered {what} with the unknown status {other}")))
            }
        }
    }
}

/// An instance of a plugin; dropping it destroys the instance.
pub struct Instance {
    table: PluginTable,
    pointer: *mut c_void,
}

// SAFETY: the ABI does not bind an instance to a thread. `call` and `destroy` must not overlap: the callers of `call`
// guarantee it (see there), `destroy` runs in `drop` with exclusive access.
unsafe impl Send for Instance {}
// SAFETY: `cancel` may come from any thread at any time; for `call` see above.
unsafe impl Sync for Instance {}

impl Instance {
    /// Runs a method and returns its reply, which is empty or JSON.
    ///
    /// The caller must make one call at a time; [`Instance::cancel`] may be called from another thread.
    pub fn call(&self, method: &str, request: &[u8]) -> Result<Vec<u8>, CallError> {
        let mut reply = FermataBytes::EMPTY;
        // SAFETY: the instance is alive, the plugin conforms to the ABI, and the bytes outlive the call.
        let status = unsafe {
            (self.table.call)(
                self.pointer,
                FermataBytes::lend(method.as_bytes()),
                FermataBytes::lend(request),
                &mut reply,
            )
        };
        self.table.conclude(method, status, reply)
    }

    /// Asks the current call to return soon.
    pub fn cancel(&self) {
        // SAFETY: the instance is alive, and `cancel` may overlap with `call`.
        unsafe { (self.table.cancel)(self.pointer) };
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        // SAFETY: `drop` has the only reference to the instance.
        unsafe { (self.table.destroy)(self.pointer) };
    }
}

unsafe extern "C" fn log(context: *mut c_void, level: u32, message: FermataBytes) {
    // SAFETY: the context is the leaked `Arc<dyn HostServices>` of `create`.
    let services = unsafe { &*context.cast_const().cast::<Arc<dyn HostServices>>() };
    // SAFETY: the message is valid during this call.
    let message = unsafe { message.view() }.unwrap_or_default();
    let message = String::from_utf8_lossy(message);
    catch_panic(|| services.log(LogLevel::from_number(level), &message));
}

unsafe extern "C" fn cancelled(context: *mut c_void) -> u32 {
    // SAFETY: the context is the leaked `Arc<dyn HostServices>` of `create`.
    let services = unsafe { &*context.cast_const().cast::<Arc<dyn HostServices>>() };
    u32::from(catch_panic(|| services.cancelled()).unwrap_or(true))
}

/// Keeps a panic of the services from unwinding into the plugin.
fn catch_panic<T>(work: impl FnOnce() -> T) -> Option<T> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).ok()
}
