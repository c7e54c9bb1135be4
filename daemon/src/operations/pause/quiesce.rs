//! Asks agents to reach a state of rest before the freeze: a message on the agent's channel, then SIGTSTP.
//!
//! | the agent | outcome | reported | after the thaw |
//! |---|---|---|---|
//! | acknowledges on its channel | frozen at once, no SIGTSTP | | runs |
//! | has a channel and does not answer | grace of the channel, then SIGTSTP as below | warning | runs |
//! | stops by default, or saves and stops itself | `Stopped`, as soon as it has | | SIGCONT, runs |
//! | ignores SIGTSTP | `Ignored` when the grace is over | | runs |
//! | waits in vfork(2) for a child that is stopped | `Stopped`, since it executes nothing either | | runs |
//! | was stopped by another process before | `AlreadyStopped` at once | warning | stays stopped |
//! | ends meanwhile | `Exited`, or a refusal: no failure | its exit | |
//! | has jobs in sessions of their own | no SIGTSTP for those, which orphaned groups ignore | | run |
//!
//! The freeze that follows stops the whole tree in any case; this step only chooses a better instant for it. Freezing by
//! cgroup and by signals pass the same tests (`daemon/tests/shim/freeze.rs`, `guard.rs`, `tests/it/pause.rs`).

use std::time::Duration;

use fermata_protocol::rpc::Notification;
use fermata_protocol::{AgentName, RunId, Target};
use serde_json::json;

use crate::errors::Failure;
use crate::operations::{AgentLink, StepContext, failpoint, side_by_side};
use crate::shims::link::LinkError;
use fermata_shim::wire::QuiesceOutcome;

/// The request that goes to the agents of a project.
#[derive(Debug, Clone)]
pub struct QuiesceRequest {
    /// `None`: the configured grace.
    pub grace_ms: Option<u64>,
    /// Why the project is paused.
    pub reason: Option<String>,
    pub operation: String,
}

/// Quiesces every run; returns warnings for the user.
///
/// An agent that does not quiesce is no failure: it is frozen wherever it is.
///
/// # Errors
/// Only from failpoints.
pub async fn run(
    step: &StepContext,
    runs: &[(AgentName, RunId)],
    request: &QuiesceRequest,
) -> Result<Vec<String>, Failure> {
    failpoint("pause.quiesce")?;
    let each = step.links_of(runs).map(|(agent, link)| {
        let (step, agent, link, request) = (step.clone(), agent.clone(), link.clone(), request.clone());
        async move { quiesce_one(&step, agent, &link, &request).await }
    });
    let mut warnings: Vec<String> = side_by_side(each.collect::<Vec<_>>()).await.into_iter().flatten().collect();
    warnings.sort();
    failpoint("pause.quiesced")?;
    Ok(warnings)
}

/// Quiesces one run; returns a warning where there is one.
async fn quiesce_one(
    step: &StepContext,
    agent: AgentName,
    link: &AgentLink,
    request: &QuiesceRequest,
) -> Option<String> {
    let settings = step.services.settings();
    let target = Target::agent(step.project.name.clone(), agent.clone());
    let channel_grace = Duration::from_millis(request.grace_ms.unwrap_or(settings.pause.channel_grace_ms));
    let notification = Notification::new(
        "pause_requested",
        json!({
            "operation_id": request.operation,
            "reason": request.reason,
            "grace_ms": u64::try_from(channel_grace.as_millis()).unwrap_or(u64::MAX),
        }),
    );
    let mut late = None;
    if let Some(mut acknowledged) = step.services.channels.request_pause(&target, &notification) {
        let all = async {
            for receiver in &mut acknowledged {
                // Fails when the channel closes meanwhile, which needs no acknowledgement.
                drop(receiver.changed().await);
            }
        };
        match tokio::time::timeout(channel_grace, all).await {
            Ok(()) => return None,
            Err(_) => {
                late = Some(format!(
                    "agent '{agent}' did not acknowledge the pause within {} ms",
                    channel_grace.as_millis()
                ));
            }
        }
    }
    let grace = Duration::from_millis(request.grace_ms.unwrap_or(settings.pause.grace_ms));
    let lease = Duration::from_millis(settings.pause.lease_ms) + grace;
    match link.shim.quiesce(grace, lease).await {
        Ok(quiesced) => match quiesced.outcome {
            // Most programs take no harm from a freeze at any instant.
            QuiesceOutcome::Ignored | QuiesceOutcome::Stopped | QuiesceOutcome::Exited => {}
            QuiesceOutcome::AlreadyStopped => {
                return Some(format!("agent '{agent}' was already stopped by another process, and stays stopped"));
            }
        },
        // An agent that is ending is no failure; any other fault shows in the freeze.
        Err(LinkError::Closed | LinkError::Refused { .. }) => {}
        Err(error) => return Some(format!("agent '{agent}': {}", fermata_protocol::error_chain(&error))),
    }
    late
}
