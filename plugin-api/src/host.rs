//! The host's side of the ABI: a plugin's table of C functions as safe calls.
//!
//! Checks what can be checked (sizes, null pointers, JSON) and copies every reply before it is
//! given back. A plugin that breaks the ABI on purpose can still crash the process: that is why
//! only `fermata-plugin-host` uses this, never the daemon itself.

use crate::abi::{self, FermataBytes, FermataHostV1, FermataPluginV1};
use crate::message::{Description, Failure};
use crate::plugin::Level;
use serde_json::Value;
use std::ffi::c_void;
use std::sync::Arc;

/// What the host does for its plugin.
pub trait Services: Send + Sync + 'static {
    /// Takes a line for the daemon's log.
    fn log(&self, level: Level, message: &str);
    /// Says whether the current call should be given up soon.
    fn cancelled(&self) -> bool;
}

/// The functions of a loaded plugin.
#[derive(Clone, Copy)]
pub struct Table {
    describe: unsafe extern "C" fn(*mut FermataBytes) -> i32,
    create: unsafe extern "C" fn(FermataBytes, *const FermataHostV1, *mut *mut c_void, *mut FermataBytes) -> i32,
    call: unsafe extern "C" fn(*mut c_void, FermataBytes, FermataBytes, *mut FermataBytes) -> i32,
    cancel: unsafe extern "C" fn(*mut c_void),
    destroy: unsafe extern "C" fn(*mut c_void),
    free: unsafe extern "C" fn(*mut u8, usize),
}

impl Table {
    /// Takes over what a plugin's entry has returned; refuses null, short and incomplete tables.
    ///
    /// # Safety
    /// `raw` must be null or point to a plugin's table in a shared object that is never unloaded
    /// and that keeps to the ABI.
    pub unsafe fn from_raw(raw: *const FermataPluginV1) -> Result<Self, Failure> {
        let incomplete = |what: String| Failure::new("bad_table", what);
        // SAFETY: by this function's contract.
        let Some((size, table)) = (unsafe { abi::copy_table(raw) }) else {
            return Err(incomplete("the plugin returned no table".to_owned()));
        };
        let least = size_of::<FermataPluginV1>();
        if size < least {
            return Err(incomplete(format!("the plugin's table has {size} bytes, at least {least} are needed")));
        }
        let missing = |name: &str| incomplete(format!("the plugin's table lacks `{name}`"));
        Ok(Self {
            describe: table.describe.ok_or_else(|| missing("describe"))?,
            create: table.create.ok_or_else(|| missing("create"))?,
            call: table.call.ok_or_else(|| missing("call"))?,
            cancel: table.cancel.ok_or_else(|| missing("cancel"))?,
            destroy: table.destroy.ok_or_else(|| missing("destroy"))?,
            free: table.free.ok_or_else(|| missing("free"))?,
        })
    }

    /// Asks the plugin who it is.
    pub fn describe(&self) -> Result<Description, Failure> {
        let mut reply = FermataBytes::EMPTY;
        // SAFETY: the plugin keeps to the ABI, and the place for the reply is valid.
        let status = unsafe { (self.describe)(&mut reply) };
        let bytes = self.conclude("describe", status, reply)?;
        serde_json::from_slice(&bytes)
            .map_err(|error| Failure::new("bad_description", format!("the plugin's description is not valid: {error}")))
    }

    /// Makes an instance.
    pub fn create(&self, settings: &Value, services: Arc<dyn Services>) -> Result<Instance, Failure> {
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
        // SAFETY: the plugin keeps to the ABI. The table of the host and its context are leaked
        // on purpose: a thread that the plugin forgot about may use them until the process ends.
        let status = unsafe { (self.create)(FermataBytes::lend(settings.as_bytes()), host, &mut pointer, &mut reply) };
        self.conclude("create", status, reply)?;
        Ok(Instance { table: *self, pointer })
    }

    /// Copies a reply, gives it back, and turns the status into a result.
    fn conclude(&self, what: &str, status: i32, reply: FermataBytes) -> Result<Vec<u8>, Failure> {
        // The length is checked before anything is copied: a reply of 4 GiB is not worth a copy.
        let bytes = if reply.len > abi::MAX_REPLY_BYTES {
            Err(Failure::new(
                "reply_too_long",
                format!("the reply to {what} has {} bytes, at most {} are allowed", reply.len, abi::MAX_REPLY_BYTES),
            ))
        } else {
            // SAFETY: the plugin keeps to the ABI: the reply is valid until it is freed.
            match unsafe { reply.view() } {
                Some(bytes) => Ok(bytes.to_vec()),
                None => Err(Failure::new("bad_reply", format!("the reply to {what} is a null pointer with a length"))),
            }
        };
        if !reply.ptr.is_null() {
            // SAFETY: the plugin made this reply, and nobody looks at it any more.
            unsafe { (self.free)(reply.ptr.cast_mut(), reply.len) };
        }
        let bytes = bytes?;
        let said = |code: &str, message: String| {
            serde_json::from_slice::<Failure>(&bytes).unwrap_or_else(|_| Failure::new(code, message))
        };
        match status {
            abi::STATUS_OK => Ok(bytes),
            abi::STATUS_UNSUPPORTED => Err(Failure::unsupported(what)),
            abi::STATUS_CANCELLED => Err(Failure::cancelled()),
            abi::STATUS_PANIC => Err(said("panic", format!("the plugin panicked in {what}"))),
            abi::STATUS_ERROR => Err(said("plugin_error", format!("the plugin failed in {what} without saying why"))),
            other => {
                Err(Failure::new("bad_status", format!("the plugin answered {what} with the unknown status {other}")))
            }
        }
    }
}

/// A plugin's instance; it is destroyed when this is dropped.
pub struct Instance {
    table: Table,
    pointer: *mut c_void,
}

// SAFETY: the ABI binds an instance to no thread. `call` and `destroy` must not overlap: `call`
// takes the caller's word for it (see there), `destroy` needs the only owner.
unsafe impl Send for Instance {}
// SAFETY: `cancel` may come from any thread at any time; for `call` see above.
unsafe impl Sync for Instance {}

impl Instance {
    /// Runs a method and returns its reply (empty, or JSON).
    ///
    /// The caller runs one call at a time; [`Instance::cancel`] may come from another thread.
    pub fn call(&self, method: &str, request: &[u8]) -> Result<Vec<u8>, Failure> {
        let mut reply = FermataBytes::EMPTY;
        // SAFETY: the instance is alive, the plugin keeps to the ABI, the bytes outlive the call.
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

    /// Asks a running call to return soon.
    pub fn cancel(&self) {
        // SAFETY: the instance is alive, and `cancel` may overlap with `call`.
        unsafe { (self.table.cancel)(self.pointer) };
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        // SAFETY: nobody else has the instance any more.
        unsafe { (self.table.destroy)(self.pointer) };
    }
}

unsafe extern "C" fn log(context: *mut c_void, level: u32, message: FermataBytes) {
    // SAFETY: the context is the leaked `Arc<dyn Services>` of `create`.
    let services = unsafe { &*context.cast_const().cast::<Arc<dyn Services>>() };
    // SAFETY: the plugin lends the message for the length of this call.
    let message = unsafe { message.view() }.unwrap_or_default();
    let message = String::from_utf8_lossy(message);
    shielded(|| services.log(Level::from_number(level), &message));
}

unsafe extern "C" fn cancelled(context: *mut c_void) -> u32 {
    // SAFETY: the context is the leaked `Arc<dyn Services>` of `create`.
    let services = unsafe { &*context.cast_const().cast::<Arc<dyn Services>>() };
    u32::from(shielded(|| services.cancelled()).unwrap_or(true))
}

/// Keeps a panic of the host's own services from unwinding into the plugin.
fn shielded<T>(work: impl FnOnce() -> T) -> Option<T> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).ok()
}
