//! Handler of `agent.show`: an agent's specification, and the variables of its environment that differ from given
//! ones. The environment itself is never shown.

use fermata_core::agent::{AgentState, EndedBy};
use fermata_core::view;
use fermata_protocol::agent::{AgentDetail, AgentShow};
use serde_json::Value;

use super::agents::{not_found, one_agent};
use super::reply::wire;
use crate::errors::Failure;
use crate::project::Projects;
use crate::services::now;
use crate::store::rows;

pub(super) async fn show(projects: &Projects, params: AgentShow) -> Result<Value, Failure> {
    let AgentShow { target, env } = params;
    let project = projects.get(&target.project)?.project();
    let name = one_agent(&target)?.clone();
    let Some(agent) = project.agents.get(&name) else { return Err(not_found(&target)) };
    let env_differs = if env.is_empty() {
        Vec::new()
    } else {
        let stored = projects
            .services()
            .store
            .read(move |connection| rows::load_environment(connection, &target.project, &name))
            .await
            .map_err(|e| Failure::fault("read the agent's environment", &e))?;
        env.into_iter().filter(|(name, value)| stored.get(name) != Some(value)).map(|(name, _)| name).collect()
    };
    wire(&AgentDetail {
        agent: view::agent(&project, agent, now()),
        spec: agent.spec.clone(),
        completed: matches!(agent.state, AgentState::Ended { by: EndedBy::Itself, .. }),
        env_differs,
    })
}
