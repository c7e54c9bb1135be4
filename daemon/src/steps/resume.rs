//! Brings agents back: thaws those that are frozen. Those that are started again are launched by
//! the project itself, one [`super::launch`] each.

use fermata_protocol::pause::{AgentResumed, Rung};
use fermata_protocol::{AgentName, RunId};

use super::{Site, side_by_side};
use crate::errors::chain;

/// Thaws these runs and says how each came back.
pub async fn thaw(site: &Site, runs: &[(AgentName, RunId)]) -> Vec<AgentResumed> {
    let each = runs.iter().map(|(agent, run)| {
        let link = site.links.get(agent).filter(|link| link.run == *run).cloned();
        let agent = agent.clone();
        async move {
            let gone = |detail: String| AgentResumed {
                agent: agent.clone(),
                rung: Rung::Failed,
                argv: None,
                detail: Some(detail),
            };
            match link {
                None => gone("its processes are gone".into()),
                Some(link) => match link.shim.thaw().await {
                    Ok(()) => AgentResumed { agent: agent.clone(), rung: Rung::Thawed, argv: None, detail: None },
                    Err(error) => gone(chain(&error)),
                },
            }
        }
    });
    side_by_side(each.collect::<Vec<_>>()).await
}
