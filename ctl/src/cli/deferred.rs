//! A subcommand's arguments that are described only once it is known to be the one that was typed.
//!
//! Describing all of some hundred takes longer than many a call to the daemon. Only who asks for help or completions wants
//! to know all of them.

use std::ops::Deref;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::{ArgMatches, Args, Command, Error, FromArgMatches, Subcommand};

/// The arguments, or subcommands, of a subcommand.
#[derive(Debug)]
pub struct Late<T>(Box<T>);

impl<T> Late<T> {
    /// Hands them out.
    pub fn into_inner(self) -> T {
        *self.0
    }
}

impl<T> Deref for Late<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T: FromArgMatches> FromArgMatches for Late<T> {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, Error> {
        Ok(Self(Box::new(T::from_arg_matches(matches)?)))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), Error> {
        self.0.update_from_arg_matches(matches)
    }
}

static ALL_AT_ONCE: AtomicBool = AtomicBool::new(false);

/// Has all subcommands described from the start, in the order in which help shows their arguments.
pub fn describe_all() {
    ALL_AT_ONCE.store(true, Ordering::Relaxed);
}

fn later(command: Command, now: fn(Command) -> Command, late: fn(Command) -> Command) -> Command {
    if ALL_AT_ONCE.load(Ordering::Relaxed) { now(command) } else { command.defer(late) }
}

/// Describes a subcommand by `describe`, but for what it is for: the list of subcommands has said that already.
fn described(command: Command, describe: fn(Command) -> Command) -> Command {
    let (about, long) = (command.get_about().cloned(), command.get_long_about().cloned());
    let command = describe(command);
    let command = if let Some(about) = about { command.about(about) } else { command };
    if let Some(long) = long { command.long_about(long) } else { command.long_about(None) }
}

impl<T: Args> Args for Late<T> {
    fn augment_args(command: Command) -> Command {
        later(command, T::augment_args, |command| described(command, T::augment_args))
    }

    fn augment_args_for_update(command: Command) -> Command {
        T::augment_args_for_update(command)
    }
}

impl<T: Subcommand> Subcommand for Late<T> {
    fn augment_subcommands(command: Command) -> Command {
        later(command, T::augment_subcommands, |command| described(command, T::augment_subcommands))
    }

    fn augment_subcommands_for_update(command: Command) -> Command {
        T::augment_subcommands_for_update(command)
    }

    fn has_subcommand(name: &str) -> bool {
        T::has_subcommand(name)
    }
}
