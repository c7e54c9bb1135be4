//! The stable C ABI of Fermata plugins, and the safe Rust traits over it.
//!
//! A plugin is a shared object that exports one symbol, [`abi::SYMBOL`], a function that returns a
//! table of functions ([`abi::FermataPluginV1`]). Requests and replies are JSON bytes. The layouts
//! are frozen: tables begin with their own `size` and only ever grow at the end; an incompatible
//! change gets a new symbol name.
//!
//! ```text
//!   abi      the layouts and constants, described once; the C header is rendered from them
//!   header   renders include/fermata_plugin.h, which a test compares with the file
//!   message  the JSON documents that cross the ABI
//!   plugin   the traits that a plugin in Rust implements: Plugin, Checkpointer, Notifier
//!   glue     Plugin -> table of C functions (used by export_plugin!)
//!   host     table of C functions -> safe calls (used by fermata-plugin-host)
//! ```
//!
//! This crate does not load shared objects; fermata-plugin-host does.
//!
//! # A plugin in Rust
//!
//! ```
//! use fermata_plugin_api::{CallError, Description, Host, Notifier, Plugin, PluginKind, export_plugin};
//! use serde_json::Value;
//!
//! struct Bell {
//!     host: Host,
//! }
//!
//! impl Plugin for Bell {
//!     fn describe() -> Description {
//!         Description::new("bell", env!("CARGO_PKG_VERSION"), [PluginKind::Notify])
//!     }
//!     fn create(_settings: Value, host: Host) -> Result<Self, CallError> {
//!         Ok(Bell { host })
//!     }
//!     fn notifier(&self) -> Option<&dyn Notifier> {
//!         Some(self)
//!     }
//! }
//!
//! impl Notifier for Bell {
//!     fn notify(&self, event: &Value) -> Result<(), CallError> {
//!         self.host.info(&format!("ding: {event}"));
//!         Ok(())
//!     }
//! }
//!
//! export_plugin!(Bell);
//! ```
#![cfg_attr(not(test), warn(clippy::wildcard_enum_match_arm))]
#![warn(missing_docs)]

pub mod abi;
pub mod glue;
pub mod header;
pub mod host;
pub mod message;
pub mod plugin;

pub use message::{
    AgentProcess, Artifact, CallError, Description, NotifyRequest, PluginKind, RestoreReply, RestoreRequest, SaveReply,
    SaveRequest, event_matches, event_name,
};
pub use plugin::{Checkpointer, Host, LogLevel, Notifier, Plugin};
