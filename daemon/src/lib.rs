//! The library behind `fermatad`, `fermata-shim` and `fermata-plugin-host`.
//!
//! The rooms are listed in the order in which they may import each other: downward only.
#![deny(unsafe_code)]

pub mod history;
#[allow(unsafe_code)]
pub mod os;
pub mod plugins;
pub mod shim;
